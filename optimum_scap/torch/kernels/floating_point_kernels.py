"""Triton kernels over float32, float16 and bfloat16 weights, launched by `floating_point`. The formula stands in
`device_functions`.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from .device_functions import accumulate_kept_channels, add_slices, list_kept_channels, wait_for_inputs


@triton.jit
def partial_sums_kernel(
    x,
    in_features,
    lists,
    list_size,
    weight_a,
    weight_b,
    weight_stride_a,
    weight_stride_b,
    partial,
    out_features_a,
    out_features_b,
    threshold_a,
    threshold_b,
    mode_a,
    mode_b,
    zero,
    PAIR: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    HOLD: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    """partial[slice, row, columns of a, then of b], programs [column blocks of a, then of b; slices]."""
    block = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    kept_list = lists + (part * tl.num_programs(0) + block).to(tl.int64) * list_size
    weight, weight_stride, out_features = weight_a, weight_stride_a, out_features_a
    threshold, mode = threshold_a, mode_a
    first_column, all_features = 0, out_features_a
    if PAIR:
        blocks_a = tl.cdiv(out_features_a, BLOCK_N)
        second = block >= blocks_a
        block = tl.where(second, block - blocks_a, block)
        weight = tl.where(second, weight_b, weight)
        weight_stride = tl.where(second, weight_stride_b, weight_stride)
        out_features = tl.where(second, out_features_b, out_features)
        threshold = tl.where(second, threshold_b, threshold)
        mode = tl.where(second, mode_b, mode)
        first_column = tl.where(second, out_features_a, 0)
        all_features = out_features_a + out_features_b
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    first = (tl.cast(in_features, tl.int64) * part // parts).to(tl.int32)
    channel_count = (tl.cast(in_features, tl.int64) * (part + 1) // parts).to(tl.int32) - first
    x += first
    wait_for_inputs(LAUNCH_EARLY)
    count = list_kept_channels(x, in_features, channel_count, threshold, mode, kept_list, ROWS, LANES, STEPS, UNROLL)
    sums = accumulate_kept_channels(
        x,
        in_features,
        threshold,
        mode,
        kept_list,
        count,
        weight + first.to(tl.int64) * weight_stride,
        weight_stride,
        columns,
        out_features,
        zero,
        ROWS,
        BLOCK_N,
        UNROLL,
        WHOLE_BLOCKS,
        HOLD,
    )
    for row in tl.static_range(ROWS):
        pointers = partial + (part * ROWS + row).to(tl.int64) * all_features + first_column + columns
        tl.store(pointers, sums[row], mask=columns < out_features)


@triton.jit
def add_partial_sums_kernel(
    partial,
    slices,
    bias_a,
    bias_b,
    out_a,
    out_b,
    out_features_a,
    out_features_b,
    HAS_BIAS_A: tl.constexpr,
    HAS_BIAS_B: tl.constexpr,
    PAIR: tl.constexpr,
    SLICES_CEIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    """out[row, columns] = partial summed over slices + bias; programs [column blocks of a, then of b; rows]."""
    block = tl.program_id(0)
    row = tl.program_id(1)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    wait_for_inputs(LAUNCH_EARLY)
    if not PAIR:
        inside = columns < out_features_a
        row_sums = partial + row.to(tl.int64) * out_features_a
        total = add_slices(row_sums, tl.num_programs(1) * out_features_a, slices, columns, inside, SLICES_CEIL)
        _store_with_bias(total, bias_a, out_a, row, columns, inside, out_features_a, HAS_BIAS_A)
    else:
        all_features = out_features_a + out_features_b
        row_sums = partial + row.to(tl.int64) * all_features
        blocks_a = tl.cdiv(out_features_a, BLOCK_N)
        if block < blocks_a:
            inside = columns < out_features_a
            total = add_slices(row_sums, tl.num_programs(1) * all_features, slices, columns, inside, SLICES_CEIL)
            _store_with_bias(total, bias_a, out_a, row, columns, inside, out_features_a, HAS_BIAS_A)
        else:
            columns -= blocks_a * BLOCK_N
            inside = columns < out_features_b
            row_sums += out_features_a
            total = add_slices(row_sums, tl.num_programs(1) * all_features, slices, columns, inside, SLICES_CEIL)
            _store_with_bias(total, bias_b, out_b, row, columns, inside, out_features_b, HAS_BIAS_B)


@triton.jit
def _add_bias(total, bias, columns, inside, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _store_with_bias(total, bias, out, row, columns, inside, out_features, HAS_BIAS: tl.constexpr):
    total = _add_bias(total, bias, columns, inside, HAS_BIAS)
    tl.store(out + row.to(tl.int64) * out_features + columns, total.to(out.dtype.element_ty), mask=inside)


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
    HAS_GATE_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
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
    gate = _add_bias(gate, gate_bias, columns, inside, HAS_GATE_BIAS)
    up = _add_bias(up, up_bias, columns, inside, HAS_UP_BIAS)
    product = _activate(gate, ACTIVATION) * up
    tl.store(out + row.to(tl.int64) * features + columns, product.to(out.dtype.element_ty), mask=inside)
