"""Triton kernels over float32, float16 and bfloat16 weights, launched by `floating_point`. The formula stands in
`device_functions`.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from .device_functions import accumulate_kept_channels, add_slices, list_kept_channels, wait_for_inputs


@triton.jit
def _choose(branch, a, b, c, BRANCHES: tl.constexpr):
    """What belongs to `branch`, of what belongs to branches 0, 1 and 2."""
    chosen = a
    if BRANCHES > 1:
        chosen = tl.where(branch == 1, b, chosen)
    if BRANCHES > 2:
        chosen = tl.where(branch == 2, c, chosen)
    return chosen


@triton.jit
def _find_branch(block, features_a, features_b, features_c, BLOCK_N: tl.constexpr, BRANCHES: tl.constexpr):
    """Of program `block`: its branch, its block there, the branch's first column, and the number of all columns."""
    branch = 0
    first_column = 0
    all_features = features_a
    if BRANCHES > 1:
        blocks_a = tl.cdiv(features_a, BLOCK_N)
        behind = block >= blocks_a
        branch = behind.to(tl.int32)
        first_column = tl.where(behind, features_a, 0)
        all_features += features_b
        block = tl.where(behind, block - blocks_a, block)
        if BRANCHES > 2:
            blocks_b = tl.cdiv(features_b, BLOCK_N)
            behind = behind & (block >= blocks_b)
            branch += behind.to(tl.int32)
            first_column += tl.where(behind, features_b, 0)
            all_features += features_c
            block = tl.where(behind, block - blocks_b, block)
    return branch, block, first_column, all_features


@triton.jit
def partial_sums_kernel(
    x,
    in_features,
    lists,
    list_size,
    weight_a,
    weight_b,
    weight_c,
    weight_stride_a,
    weight_stride_b,
    weight_stride_c,
    partial,
    out_features_a,
    out_features_b,
    out_features_c,
    threshold_a,
    threshold_b,
    threshold_c,
    mode_a,
    mode_b,
    mode_c,
    zero,
    BRANCHES: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    HOLD: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    """partial[slice, row, columns of a, then of b, then of c], programs [column blocks of all branches; slices]."""
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    kept_list = lists + (part * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * list_size
    branch, block, first_column, all_features = _find_branch(
        tl.program_id(0), out_features_a, out_features_b, out_features_c, BLOCK_N, BRANCHES
    )
    weight = _choose(branch, weight_a, weight_b, weight_c, BRANCHES)
    weight_stride = _choose(branch, weight_stride_a, weight_stride_b, weight_stride_c, BRANCHES)
    out_features = _choose(branch, out_features_a, out_features_b, out_features_c, BRANCHES)
    threshold = _choose(branch, threshold_a, threshold_b, threshold_c, BRANCHES)
    mode = _choose(branch, mode_a, mode_b, mode_c, BRANCHES)
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
    bias_c,
    out_a,
    out_b,
    out_c,
    out_features_a,
    out_features_b,
    out_features_c,
    HAS_BIAS_A: tl.constexpr,
    HAS_BIAS_B: tl.constexpr,
    HAS_BIAS_C: tl.constexpr,
    BRANCHES: tl.constexpr,
    SLICES_CEIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    """out[row, columns] = partial summed over slices + bias; programs [column blocks of all branches; rows]."""
    row = tl.program_id(1)
    branch, block, first_column, all_features = _find_branch(
        tl.program_id(0), out_features_a, out_features_b, out_features_c, BLOCK_N, BRANCHES
    )
    out_features = _choose(branch, out_features_a, out_features_b, out_features_c, BRANCHES)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < out_features
    row_sums = partial + row.to(tl.int64) * all_features + first_column
    wait_for_inputs(LAUNCH_EARLY)
    total = add_slices(row_sums, tl.num_programs(1) * all_features, slices, columns, inside, SLICES_CEIL)
    _store_in_branch(
        total,
        branch,
        row,
        columns,
        inside,
        out_features,
        bias_a,
        bias_b,
        bias_c,
        out_a,
        out_b,
        out_c,
        HAS_BIAS_A,
        HAS_BIAS_B,
        HAS_BIAS_C,
        BRANCHES,
    )


@triton.jit
def dense_kernel(
    x,
    in_features,
    weight_a,
    weight_b,
    weight_c,
    weight_stride_a,
    weight_stride_b,
    weight_stride_c,
    bias_a,
    bias_b,
    bias_c,
    out_a,
    out_b,
    out_c,
    out_features_a,
    out_features_b,
    out_features_c,
    HAS_BIAS_A: tl.constexpr,
    HAS_BIAS_B: tl.constexpr,
    HAS_BIAS_C: tl.constexpr,
    BRANCHES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    """out = weight x + bias of one token, weights output-channel-major; programs [blocks of BLOCK_N outputs]."""
    branch, block, _, _ = _find_branch(
        tl.program_id(0), out_features_a, out_features_b, out_features_c, BLOCK_N, BRANCHES
    )
    weight = _choose(branch, weight_a, weight_b, weight_c, BRANCHES)
    weight_stride = _choose(branch, weight_stride_a, weight_stride_b, weight_stride_c, BRANCHES)
    out_features = _choose(branch, out_features_a, out_features_b, out_features_c, BRANCHES)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < out_features
    channels = tl.arange(0, BLOCK_K)
    pointers = weight + rows.to(tl.int64)[:, None] * weight_stride + channels[None, :]
    # Weights do not depend on the kernels in front: the first are under way before x is waited for.
    weights = tl.load(
        pointers, mask=inside[:, None] & (channels < in_features)[None, :], other=0.0, eviction_policy="evict_first"
    )
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    wait_for_inputs(LAUNCH_EARLY)
    for start in range(0, in_features, BLOCK_K):
        values = tl.load(x + start + channels, mask=channels < in_features - start, other=0.0)
        mask = inside[:, None] & (channels < in_features - start - BLOCK_K)[None, :]
        following = tl.load(pointers + start + BLOCK_K, mask=mask, other=0.0, eviction_policy="evict_first")
        sums = tl.fma(weights.to(tl.float32), tl.broadcast_to(values.to(tl.float32)[None, :], sums.shape), sums)
        weights = following
    total = tl.sum(sums, 1)
    _store_in_branch(
        total,
        branch,
        0,
        rows,
        inside,
        out_features,
        bias_a,
        bias_b,
        bias_c,
        out_a,
        out_b,
        out_c,
        HAS_BIAS_A,
        HAS_BIAS_B,
        HAS_BIAS_C,
        BRANCHES,
    )


@triton.jit
def _store_in_branch(
    total,
    branch,
    row,
    columns,
    inside,
    out_features,
    bias_a,
    bias_b,
    bias_c,
    out_a,
    out_b,
    out_c,
    HAS_BIAS_A: tl.constexpr,
    HAS_BIAS_B: tl.constexpr,
    HAS_BIAS_C: tl.constexpr,
    BRANCHES: tl.constexpr,
):
    # The biases may be of different types: a pointer cannot be chosen among them.
    if branch == 0 or BRANCHES == 1:
        _store_with_bias(total, bias_a, out_a, row, columns, inside, out_features, HAS_BIAS_A)
    if BRANCHES > 1 and branch == 1:
        _store_with_bias(total, bias_b, out_b, row, columns, inside, out_features, HAS_BIAS_B)
    if BRANCHES > 2 and branch == 2:
        _store_with_bias(total, bias_c, out_c, row, columns, inside, out_features, HAS_BIAS_C)


@triton.jit
def _add_bias(total, bias, columns, inside, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def _store_with_bias(total, bias, out, row, columns, inside, out_features, HAS_BIAS: tl.constexpr):
    total = _add_bias(total, bias, columns, inside, HAS_BIAS)
    tl.store(out + tl.cast(row, tl.int64) * out_features + columns, total.to(out.dtype.element_ty), mask=inside)


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
