"""The Triton kernels, launched by `launch`. The formula stands in `device_functions`.

A launch computes up to three layers over one input, its branches: `find_branch` tells a program which is its own.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from .device_functions import (
    accumulate_kept_channels,
    add_slices,
    choose,
    choose_each,
    find_branch,
    list_kept_channels,
    wait_for_inputs,
)


@triton.jit
def partial_sums_kernel(
    x,
    in_features,
    lists,
    list_size,
    weights,
    strides,
    partial,
    out_features,
    thresholds,
    modes,
    scales,
    zero,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HOLD: tl.constexpr,
    LOAD: tl.constexpr,
    CONSTANTS: tl.constexpr,
    COLUMNS_PER_WORD: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    """partial[slice, row, columns of all branches in turn], programs [column blocks of all branches; slices].

    `out_features`, `thresholds`, `modes`, `scales` and HAS_SCALE (or None if no branch has one) are tuples with an
    element per branch; `weights` and `strides` hold such tuples, one for each tensor and stride of the format that
    LOAD, a function of `load`, reads.
    """
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    kept_list = lists + (part * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * list_size
    branch, block, first_column, all_features = find_branch(tl.program_id(0), out_features, BLOCK_N)
    features = choose(branch, out_features)
    threshold = choose(branch, thresholds)
    mode = choose(branch, modes)
    words = block * (BLOCK_N // COLUMNS_PER_WORD) + tl.arange(0, BLOCK_N // COLUMNS_PER_WORD)
    word_mask = None
    if not WHOLE_BLOCKS:
        word_mask = words < tl.cdiv(features, COLUMNS_PER_WORD)
    first = (tl.cast(in_features, tl.int64) * part // parts).to(tl.int32)
    channel_count = (tl.cast(in_features, tl.int64) * (part + 1) // parts).to(tl.int32) - first
    x += first
    scale = None
    if HAS_SCALE is not None:
        scale = (choose(branch, scales) + first, choose(branch, HAS_SCALE))
    wait_for_inputs(LAUNCH_EARLY)
    count = list_kept_channels(
        x, in_features, channel_count, threshold, mode, scale, kept_list, ROWS, LANES, STEPS, UNROLL
    )
    sums = accumulate_kept_channels(
        x,
        in_features,
        threshold,
        mode,
        scale,
        kept_list,
        count,
        choose_each(branch, weights),
        choose_each(branch, strides),
        first,
        words,
        word_mask,
        zero,
        ROWS,
        BLOCK_N,
        UNROLL,
        HOLD,
        LOAD,
        CONSTANTS,
    )
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    for row in tl.static_range(ROWS):
        pointers = partial + (part * ROWS + row).to(tl.int64) * all_features + first_column + columns
        tl.store(pointers, sums[row], mask=columns < features)


@triton.jit
def add_partial_sums_kernel(
    partial,
    slices,
    biases,
    outs,
    out_features,
    SLICES_CEIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    """out[row, columns] = partial summed over slices + bias; programs [column blocks of all branches; rows].

    `biases`, of which any may be None, `outs` and `out_features` are tuples with an element per branch.
    """
    row = tl.program_id(1)
    branch, block, first_column, all_features = find_branch(tl.program_id(0), out_features, BLOCK_N)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < choose(branch, out_features)
    row_sums = partial + row.to(tl.int64) * all_features + first_column
    wait_for_inputs(LAUNCH_EARLY)
    total = add_slices(row_sums, tl.num_programs(1) * all_features, slices, columns, inside, SLICES_CEIL)
    _store_in_branch(total, branch, row, columns, inside, out_features, biases, outs)


@triton.jit
def dense_kernel(
    x,
    in_features,
    weights,
    strides,
    biases,
    outs,
    out_features,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOAD: tl.constexpr,
    CONSTANTS: tl.constexpr,
    COLUMNS_PER_WORD: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    """out = W x + bias of one token; programs [blocks of BLOCK_N outputs]. Weights as of `partial_sums_kernel`.

    `biases`, of which any may be None, `outs` and `out_features` are tuples with an element per branch.
    """
    branch, block, _, _ = find_branch(tl.program_id(0), out_features, BLOCK_N)
    features = choose(branch, out_features)
    weights = choose_each(branch, weights)
    strides = choose_each(branch, strides)
    words = block * (BLOCK_N // COLUMNS_PER_WORD) + tl.arange(0, BLOCK_N // COLUMNS_PER_WORD)[:, None]
    word_mask = words < tl.cdiv(features, COLUMNS_PER_WORD)
    channels = tl.arange(0, BLOCK_K)
    row = (channels[None, :],)
    # Weights do not depend on the kernels in front: the first are under way before x is waited for.
    (ready,) = LOAD(weights, strides, 0, row, words, word_mask, row[0] < in_features, 0, None, CONSTANTS)
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    wait_for_inputs(LAUNCH_EARLY)
    for start in range(0, in_features, BLOCK_K):
        values = tl.load(x + start + channels, mask=channels < in_features - start, other=0.0)
        channel_mask = row[0] < in_features - start - BLOCK_K
        (following,) = LOAD(weights, strides, start + BLOCK_K, row, words, word_mask, channel_mask, 0, None, CONSTANTS)
        sums = tl.fma(ready.to(tl.float32), tl.broadcast_to(values.to(tl.float32)[None, :], sums.shape), sums)
        ready = following
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    _store_in_branch(tl.sum(sums, 1), branch, 0, columns, columns < features, out_features, biases, outs)


@triton.jit
def _store_in_branch(total, branch, row, columns, inside, out_features, biases, outs):
    # Not chosen as the weights are: the biases may be of different types.
    for number in tl.static_range(len(outs)):
        if branch == number:
            biased = _add_bias(total, biases[number], columns, inside)
            pointers = outs[number] + tl.cast(row, tl.int64) * out_features[number] + columns
            tl.store(pointers, biased.to(outs[number].dtype.element_ty), mask=inside)


@triton.jit
def _add_bias(total, bias, columns, inside):
    if bias is not None:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation functions of `reference.ACTIVATIONS`, in float32."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(z)) = sigmoid(2 z)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add_gated_partial_sums_kernel(
    partial,
    slices,
    gate_bias,
    up_bias,
    out,
    features,
    ACTIVATION: tl.constexpr,
    SLICES_CEIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    """out[row, columns] = activation(gate) * up, both summed over slices; programs [column blocks; rows]."""
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < features
    row_sums = partial + row.to(tl.int64) * 2 * features
    slice_stride = tl.num_programs(1) * 2 * features
    wait_for_inputs(LAUNCH_EARLY)
    gate = add_slices(row_sums, slice_stride, slices, columns, inside, SLICES_CEIL)
    up = add_slices(row_sums + features, slice_stride, slices, columns, inside, SLICES_CEIL)
    gate = _add_bias(gate, gate_bias, columns, inside)
    up = _add_bias(up, up_bias, columns, inside)
    product = _activate(gate, ACTIVATION) * up
    tl.store(out + row.to(tl.int64) * features + columns, product.to(out.dtype.element_ty), mask=inside)
