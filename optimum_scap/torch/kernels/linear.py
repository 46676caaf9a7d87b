"""The Triton kernels, launched by `launch`. The formula stands in `device_functions`.

A launch computes up to three layers over one input, its branches: `find_branch` tells a program which is its own.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from .device_functions import (
    accumulate_channels,
    add_each,
    add_slices,
    choose,
    choose_each,
    columns_of,
    find_branch,
    list_kept_channels,
    wait_for_inputs,
    zeros,
)
from .fixed_point import accumulate_fixed_point, list_in_fixed_point, scale_fixed_point
from .load import read_dense


@triton.jit
def partial_sums_kernel(
    x,
    in_features,
    lists,
    list_size,
    group_ends,
    groups,
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
    FIXED_POINT: tl.constexpr,
    SLICE_SIZE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HOLD: tl.constexpr,
    READ: tl.constexpr,
    UNPACK: tl.constexpr,
    LOAD_SCALES: tl.constexpr,
    APPLY_SCALES: tl.constexpr,
    CONSTANTS: tl.constexpr,
    PARTS: tl.constexpr,
    WORDS_PER_TILE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    """partial[slice, row, columns of all branches in turn], programs [column blocks of all branches; slices].

    `out_features`, `thresholds`, `modes`, `scales` and HAS_SCALE (or None if no branch has one) are tuples with an
    element per branch; `weights` and `strides` hold such tuples, one for each tensor and stride of the format, whose
    functions, see `load`, are READ, UNPACK, LOAD_SCALES and APPLY_SCALES. Words hold PARTS columns. A program has
    `groups` elements of `group_ends`, unless that is None, because no slice holds channels of two groups. With
    FIXED_POINT products are computed as `fixed_point` says, of one row; the elements of `lists` are of 64 bits then. A
    slice has up to SLICE_SIZE channels, if it matters.
    """
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    program = (part * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    branch, block, first_column, all_features = find_branch(tl.program_id(0), out_features, BLOCK_N)
    features = choose(branch, out_features)
    threshold = choose(branch, thresholds)
    mode = choose(branch, modes)
    weights = choose_each(branch, weights)
    strides = choose_each(branch, strides)
    words = block * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
    word_mask = None
    if not WHOLE_BLOCKS:
        word_mask = words < tl.cdiv(features, PARTS * WORDS_PER_TILE) * WORDS_PER_TILE
    first = (tl.cast(in_features, tl.int64) * part // parts).to(tl.int32)
    channel_count = (tl.cast(in_features, tl.int64) * (part + 1) // parts).to(tl.int32) - first
    x += first
    scale = None
    if HAS_SCALE is not None:
        scale = (choose(branch, scales) + first, choose(branch, HAS_SCALE))
    ends = None
    if group_ends is not None:
        ends = group_ends + program * groups
    scales_of_slice = None
    if group_ends is None:
        # These do not depend on the kernels in front: they are under way before x is waited for.
        scales_of_slice = LOAD_SCALES(weights, strides, first // GROUP_SIZE, words, word_mask, features, CONSTANTS)
    wait_for_inputs(LAUNCH_EARLY)
    kept_list = lists + program * list_size
    if FIXED_POINT:
        row_words = tl.cast(strides[0], tl.uint32) * WORDS_PER_TILE
        words_of_slice = weights[0] + tl.cast(first, tl.int64) * row_words + words
        count, unit = list_in_fixed_point(
            x,
            channel_count,
            threshold,
            mode,
            scale,
            kept_list,
            row_words,
            ends,
            first,
            LANES,
            STEPS,
            UNROLL,
            GROUP_SIZE,
            SLICE_SIZE <= LANES * STEPS,
        )
    else:
        count = list_kept_channels(
            x,
            in_features,
            channel_count,
            threshold,
            mode,
            scale,
            kept_list,
            ends,
            first,
            ROWS,
            LANES,
            STEPS,
            UNROLL,
            GROUP_SIZE,
        )
    totals = zeros(ROWS * PARTS, BLOCK_N // PARTS)
    begin = 0
    end = count
    first_group = first // GROUP_SIZE
    groups_of_slice = 1
    if group_ends is not None:
        groups_of_slice = (first + channel_count - 1) // GROUP_SIZE - first_group + 1
    for number in range(0, groups_of_slice):
        weight_scales = scales_of_slice
        if group_ends is not None:
            end = tl.load(ends + number)
            group = first_group + number
            weight_scales = LOAD_SCALES(weights, strides, group, words, word_mask, features, CONSTANTS)
        if FIXED_POINT:
            sums = accumulate_fixed_point(
                kept_list + begin,
                end - begin,
                words_of_slice,
                word_mask,
                zero,
                UNROLL,
                HOLD,
                CONSTANTS[0],
                WORDS_PER_TILE,
                group_ends is None,
            )
            scaled = scale_fixed_point(sums, unit, weight_scales, CONSTANTS, SLICE_SIZE)
        else:
            sums = accumulate_channels(
                x,
                in_features,
                threshold,
                mode,
                scale,
                kept_list + begin,
                end - begin,
                weights,
                strides,
                first,
                words,
                word_mask,
                zero,
                ROWS,
                PARTS,
                UNROLL,
                HOLD,
                READ,
                UNPACK,
                CONSTANTS,
            )
            scaled = APPLY_SCALES(sums, weight_scales, ROWS, CONSTANTS)
        totals = add_each(totals, scaled)
        begin = end
    for row in tl.static_range(ROWS):
        sums_of_row = partial + (part * ROWS + row).to(tl.int64) * all_features + first_column
        for number in tl.static_range(PARTS):
            columns = columns_of(words, number, WORDS_PER_TILE, PARTS)
            mask = None if WHOLE_BLOCKS else columns < features
            tl.store(sums_of_row + columns, totals[row * PARTS + number], mask=mask)


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
    LAUNCH_EARLY: tl.constexpr,
):
    """out = W x + bias of one token; programs [blocks of BLOCK_N outputs]. Weights, `dense` ones, as of
    `partial_sums_kernel`.

    `biases`, of which any may be None, `outs` and `out_features` are tuples with an element per branch.
    """
    branch, block, _, _ = find_branch(tl.program_id(0), out_features, BLOCK_N)
    features = choose(branch, out_features)
    weights = choose_each(branch, weights)
    strides = choose_each(branch, strides)
    words = block * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    word_mask = words < features
    channels = tl.arange(0, BLOCK_K)
    row = (channels[None, :],)
    # Weights do not depend on the kernels in front: the first are under way before x is waited for.
    (ready,) = read_dense(weights, strides, 0, row, words, word_mask, row[0] < in_features, 0, None, (False,))
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    wait_for_inputs(LAUNCH_EARLY)
    for start in range(0, in_features, BLOCK_K):
        values = tl.load(x + start + channels, mask=channels < in_features - start, other=0.0)
        channel_mask = row[0] < in_features - start - BLOCK_K
        (following,) = read_dense(
            weights, strides, start + BLOCK_K, row, words, word_mask, channel_mask, 0, None, (False,)
        )
        sums = tl.fma(ready.to(tl.float32), tl.broadcast_to(values.to(tl.float32)[None, :], sums.shape), sums)
        ready = following
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    _store_in_branch(tl.sum(sums, 1), branch, 0, columns, columns < features, out_features, biases, outs)


@triton.jit
def _join_parts(parts):
    """A tuple of 2^n tensors as one that has n dimensions of two elements more; together they count the parts."""
    if len(parts) == 1:
        return parts[0]
    else:
        half: tl.constexpr = len(parts) // 2
        joined = ()
        for number in tl.static_range(half):
            joined += (tl.join(parts[number], parts[number + half]),)
        return _join_parts(joined)


@triton.jit
def dequantize_kernel(
    weights,
    strides,
    dequantized,
    dequantized_stride,
    first_word,
    end,
    in_features,
    out_features,
    BLOCK_K: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    UNPACK: tl.constexpr,
    LOAD_SCALES: tl.constexpr,
    APPLY_SCALES: tl.constexpr,
    CONSTANTS: tl.constexpr,
    PARTS: tl.constexpr,
    WORDS_PER_TILE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """dequantized[input channel, column] of the columns that begin with `first_word`, up to column `end`; programs
    [blocks of BLOCK_WORDS words; blocks of BLOCK_K input channels].
    """
    block = tl.program_id(0)
    words = first_word + block * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)[None, :]
    first = tl.program_id(1) * BLOCK_K
    channels = first + tl.arange(0, BLOCK_K)[:, None]
    inside = words < tl.cdiv(out_features, PARTS * WORDS_PER_TILE) * WORDS_PER_TILE
    pointers = weights[0] + channels.to(tl.int64) * (strides[0] * WORDS_PER_TILE) + words
    numbers = UNPACK(tl.load(pointers, mask=inside & (channels < in_features), other=0), 0, CONSTANTS)
    group = first // GROUP_SIZE
    if GROUP_SIZE % BLOCK_K != 0:
        group = tl.minimum(channels, in_features - 1) // GROUP_SIZE
    scales = LOAD_SCALES(weights, strides, group, words, inside, out_features, CONSTANTS)
    # As sums over one channel with x = 1.
    totals = APPLY_SCALES(numbers + (tl.full((), 1.0, tl.float32),), scales, 1, CONSTANTS)
    rounded = ()
    for part in tl.static_range(PARTS):
        rounded += (totals[part].to(dequantized.dtype.element_ty),)
    # Neighbors in a tile belong to neighboring columns of the same part.
    TILES: tl.constexpr = BLOCK_WORDS // WORDS_PER_TILE
    by_word = tl.reshape(_join_parts(rounded), (BLOCK_K, TILES, WORDS_PER_TILE, PARTS))
    by_column = tl.reshape(tl.permute(by_word, (0, 1, 3, 2)), (BLOCK_K, BLOCK_WORDS * PARTS))
    columns = block * BLOCK_WORDS * PARTS + tl.arange(0, BLOCK_WORDS * PARTS)[None, :]
    pointers = dequantized + channels.to(tl.int64) * dequantized_stride + columns
    tl.store(pointers, by_column, mask=(channels < in_features) & (columns < end - first_word * PARTS))


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
