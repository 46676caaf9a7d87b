"""The Triton kernels of a mixture of experts for few tokens, launched by `launch_experts`.

A pair is a token and one of the experts that were chosen for it. Which experts these are is read on the GPU, so that a
CUDA graph serves any routing. The formula, and what the programs do, stand in `device_functions`.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from .device_functions import accumulate_channels, add_slices, find_branch, list_kept_channels, wait_for_inputs
from .linear import _activate
from .load import read_dense, unpack_dense


@triton.jit
def _expert_of(chosen, pair, experts):
    """The expert of a pair, and whether there is one of this number."""
    expert = tl.load(chosen + pair).to(tl.int64)
    valid = (expert >= 0) & (expert < experts)
    return tl.where(valid, expert, 0), valid


@triton.jit
def expert_partial_sums_kernel(
    x,
    in_features,
    chosen,
    experts,
    lists,
    list_size,
    weights,
    expert_stride,
    channel_stride,
    partial,
    out_features,
    thresholds,
    modes,
    zero,
    PAIRS_PER_ROW: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    HOLD: tl.constexpr,
    CONSTANTS: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    """partial[slice, pair, columns of all branches in turn], programs [column blocks of all branches; slices; pairs].

    `x` has a row for PAIRS_PER_ROW pairs. The branches, of `out_features` columns each, stand side by side in the
    weights of an input channel. `thresholds` and `modes` are `[branches, experts]`.
    """
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    pair = tl.program_id(2)
    program = ((pair * parts + part) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    branch, block, first_column, all_features = find_branch(tl.program_id(0), out_features, BLOCK_N)
    features = out_features[0]
    words = block * BLOCK_N + tl.arange(0, BLOCK_N)
    word_mask = None
    if not WHOLE_BLOCKS:
        word_mask = words < features
    first = (tl.cast(in_features, tl.int64) * part // parts).to(tl.int32)
    channel_count = (tl.cast(in_features, tl.int64) * (part + 1) // parts).to(tl.int32) - first
    wait_for_inputs(LAUNCH_EARLY)
    expert, valid = _expert_of(chosen, pair, experts)
    channel_count = tl.where(valid, channel_count, 0)
    threshold = tl.load(thresholds + branch * experts + expert)
    mode = tl.load(modes + branch * experts + expert)
    x += (pair // PAIRS_PER_ROW).to(tl.int64) * in_features + first
    kept_list = lists + program * list_size
    count = list_kept_channels(
        x,
        in_features,
        channel_count,
        threshold,
        mode,
        None,
        kept_list,
        None,
        first,
        1,
        LANES,
        STEPS,
        UNROLL,
        1,
    )
    sums = accumulate_channels(
        x,
        in_features,
        threshold,
        mode,
        None,
        kept_list,
        count,
        (weights + expert * expert_stride + first_column,),
        (channel_stride,),
        first,
        words,
        word_mask,
        zero,
        1,
        1,
        UNROLL,
        HOLD,
        read_dense,
        unpack_dense,
        CONSTANTS,
    )
    pairs = tl.num_programs(2)
    sums_of_pair = partial + (part * pairs + pair).to(tl.int64) * all_features + first_column
    tl.store(sums_of_pair + words, sums[0], mask=word_mask)


@triton.jit
def expert_hidden_kernel(
    partial,
    slices,
    chosen,
    experts,
    bias,
    out,
    features,
    SLICES_CEIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    """out[pair, columns] = activation(gate) * up, both summed over slices; programs [column blocks; pairs].

    `bias` is `[experts, 2 * features]` or None.
    """
    pair = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < features
    sums_of_pair = partial + pair.to(tl.int64) * 2 * features
    slice_stride = tl.num_programs(1) * 2 * features
    wait_for_inputs(LAUNCH_EARLY)
    gate = add_slices(sums_of_pair, slice_stride, slices, columns, inside, SLICES_CEIL)
    up = add_slices(sums_of_pair + features, slice_stride, slices, columns, inside, SLICES_CEIL)
    if bias is not None:
        expert, _ = _expert_of(chosen, pair, experts)
        own = bias + expert * 2 * features
        gate += tl.load(own + columns, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(own + features + columns, mask=inside, other=0.0).to(tl.float32)
    product = _activate(gate, ACTIVATION) * up
    tl.store(out + pair.to(tl.int64) * features + columns, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def expert_outputs_kernel(
    partial,
    slices,
    chosen,
    experts,
    routing,
    bias,
    out,
    features,
    PAIRS_PER_ROW: tl.constexpr,
    SLICES_CEIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    """out[row, columns] = the outputs of the row's experts times `routing`, in their order; programs [column blocks;
    rows].

    `bias` is `[experts, features]` or None.
    """
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < features
    slice_stride = tl.num_programs(1) * PAIRS_PER_ROW * features
    wait_for_inputs(LAUNCH_EARLY)
    total = tl.zeros([BLOCK_N], tl.float32)
    for number in range(PAIRS_PER_ROW):
        pair = row * PAIRS_PER_ROW + number
        sums_of_pair = partial + pair.to(tl.int64) * features
        value = add_slices(sums_of_pair, slice_stride, slices, columns, inside, SLICES_CEIL)
        expert, valid = _expert_of(chosen, pair, experts)
        if bias is not None:
            value += tl.load(bias + expert * features + columns, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(valid, value * tl.load(routing + pair).to(tl.float32), 0.0)
    tl.store(out + row.to(tl.int64) * features + columns, total.to(out.dtype.element_ty), mask=inside)
