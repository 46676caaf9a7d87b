"""Launches the Triton kernels: the operations of `library` on a GPU. What they compute stands in `reference`."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..weights import find_format
from ..weights.packed import PackedFormat
from .branches import Branch, dense_branches, launches, outputs, row_of, rows_of, sparse_branches
from .configurations import (
    DenseConfiguration,
    LaunchConfiguration,
    configuration_for,
    dense_configuration_for,
    supports_early_launch,
)
from .fixed_point import MAX_CHANNELS
from .linear import (
    add_gated_partial_sums_kernel,
    add_partial_sums_kernel,
    dense_kernel,
    dequantize_kernel,
    partial_sums_kernel,
)
from .load import FORMAT_FUNCTIONS
from .memory import hold_instructions


MAX_STEPS = 16
SUM_WARPS = 4
DEQUANTIZED_WORDS = 32
DEQUANTIZED_CHANNELS = 32


def sparse_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    format: str,
    bias: Tensor | None,
    threshold: float,
    mode: float,
    scale: Tensor | None,
    configuration: LaunchConfiguration | None = None,
) -> Tensor:
    """See `reference.sparse_linear`."""
    return sparse_linear_group(x, weights, format, [bias], [threshold], [mode], [scale], configuration)[0]


def sparse_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    format: str,
    biases: Sequence[Tensor | None],
    thresholds: Sequence[float],
    modes: Sequence[float],
    scales: Sequence[Tensor | None],
    configuration: LaunchConfiguration | None = None,
) -> list[Tensor]:
    """See `reference.sparse_linear_group`."""
    flat = rows_of(x)
    branches = sparse_branches(flat, weights, format, thresholds, modes, scales)
    outs = outputs(flat, branches)
    for together in launches(branches):
        _launch_sparse(flat, branches[together], format, biases[together], outs[together], configuration)
    return [out.view(*x.shape[:-1], out.shape[1]) for out in outs]


def linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    format: str,
    biases: Sequence[Tensor | None],
    configuration: DenseConfiguration | None = None,
) -> list[Tensor]:
    """See `reference.linear_group`. `configuration` is for dense weights; others run through the sparse kernels, whose
    layout they have, with thresholds that keep all channels.
    """
    flat = row_of(x)
    branches = dense_branches(flat, weights, format)
    outs = outputs(flat, branches)
    for together in launches(branches):
        if format == "dense":
            _launch_dense(flat, branches[together], biases[together], outs[together], configuration)
        else:
            _launch_sparse(flat, branches[together], format, biases[together], outs[together], None)
    return [out.view(*x.shape[:-1], out.shape[1]) for out in outs]


def sparse_gated_linear(
    x: Tensor,
    gate_weights: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    format: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    gate_threshold: float,
    up_threshold: float,
    gate_mode: float,
    up_mode: float,
    gate_scale: Tensor | None,
    up_scale: Tensor | None,
    activation: str,
    configuration: LaunchConfiguration | None = None,
) -> Tensor:
    """See `reference.sparse_gated_linear`."""
    flat = rows_of(x)
    branches = sparse_branches(
        flat,
        [*gate_weights, *up_weights],
        format,
        [gate_threshold, up_threshold],
        [gate_mode, up_mode],
        [gate_scale, up_scale],
    )
    features = branches[0].out_features
    if branches[1].out_features != features:
        raise ValueError(f"gate has {features} output features, up has {branches[1].out_features}")
    (out,) = outputs(flat, branches[:1])
    if flat.shape[0] > 0:
        configuration = configuration or _configuration(flat, branches, format)
        with _on_device(flat):
            partial = _partial_sums(flat, branches, format, configuration)
            add_gated_partial_sums_kernel[(triton.cdiv(features, configuration.sum_block), flat.shape[0])](
                partial,
                partial.shape[0],
                *_contiguous([gate_bias, up_bias]),
                out,
                features,
                ACTIVATION=activation,
                SLICES_CEIL=triton.next_power_of_2(partial.shape[0]),
                BLOCK_N=configuration.sum_block,
                num_warps=SUM_WARPS,
                **_early_launch(x.device),
            )
    return out.view(*x.shape[:-1], features)


def integer_linear(x: Tensor, weights: Sequence[Tensor], format: str, bias: Tensor | None) -> Tensor:
    """See `reference.integer_linear`."""
    weight_format = find_format(format)
    assert isinstance(weight_format, PackedFormat)
    out_features, in_features = weight_format.shape(weights)
    flat = x.reshape(-1, x.shape[-1])
    if in_features != flat.shape[1]:
        raise ValueError(f"weight of {in_features} input channels, input of {flat.shape[1]}")
    arguments = weight_format.kernel_arguments(weights, input_major=True)
    out = x.new_empty((flat.shape[0], out_features))
    blocks = list(weight_format.blocks(weights, x.dtype))
    block = x.new_empty((in_features, max((end - begin for begin, end in blocks), default=0)))
    with _on_device(x):
        for begin, end in blocks:
            weight = block[:, : end - begin]
            words = triton.cdiv(end - begin, arguments.columns_per_word)
            dequantize_kernel[(triton.cdiv(words, DEQUANTIZED_WORDS), triton.cdiv(in_features, DEQUANTIZED_CHANNELS))](
                arguments.tensors,
                arguments.strides,
                weight,
                block.shape[1],
                begin // arguments.columns_per_word,
                end,
                in_features,
                out_features,
                BLOCK_K=DEQUANTIZED_CHANNELS,
                BLOCK_WORDS=DEQUANTIZED_WORDS,
                UNPACK=FORMAT_FUNCTIONS[format].unpack,
                LOAD_SCALES=FORMAT_FUNCTIONS[format].load_scales,
                APPLY_SCALES=FORMAT_FUNCTIONS[format].apply_scales,
                CONSTANTS=(*arguments.constants, True),
                PARTS=arguments.columns_per_word,
                WORDS_PER_TILE=arguments.words_per_tile,
                GROUP_SIZE=arguments.group_size,
                num_warps=4,
            )
            if bias is None:
                torch.mm(flat, weight, out=out[:, begin:end])
            else:
                torch.addmm(bias[begin:end].to(x.dtype), flat, weight, out=out[:, begin:end])
    return out.view(*x.shape[:-1], out_features)


def _configuration(x: Tensor, branches: Sequence[Branch], format: str) -> LaunchConfiguration:
    out_features = tuple(branch.out_features for branch in branches)
    weights = branches[0].weights
    return configuration_for(x, out_features, weights.bits, format, weights.group_size)


def _launch_sparse(
    x: Tensor,
    branches: Sequence[Branch],
    format: str,
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    configuration: LaunchConfiguration | None,
) -> None:
    if x.shape[0] == 0:
        return
    configuration = configuration or _configuration(x, branches, format)
    with _on_device(x):
        partial = _partial_sums(x, branches, format, configuration)
        _add_partial_sums(x, partial, biases, outs, configuration.sum_block)


def _partial_sums(
    x: Tensor,
    branches: Sequence[Branch],
    format: str,
    configuration: LaunchConfiguration,
) -> Tensor:
    """Launches `partial_sums_kernel`; x is [rows, in_features], contiguous."""
    rows, in_features = x.shape
    out_features = tuple(branch.out_features for branch in branches)
    weights = branches[0].weights
    block_n = configuration.block_n(weights.bits)
    blocks = sum(triton.cdiv(features, block_n) for features in out_features)
    slices = min(configuration.slices, in_features)
    slice_size = triton.cdiv(in_features, slices)
    list_size = triton.cdiv(slice_size + 2 * configuration.unroll, 16) * 16
    programs = slices * blocks
    fixed_point = (
        rows == 1
        and weights.group_size is not None
        and torch.version.hip is None  # which has no instruction for it
        and configuration.unroll % 4 == 0
        and slice_size * weights.tensors[0].stride(0) < 1 << 31
        and slice_size <= MAX_CHANNELS
    )
    list_dtype = torch.int16 if slice_size <= torch.iinfo(torch.int16).max else torch.int32
    list_dtype = torch.int64 if fixed_point else list_dtype
    lists = torch.empty(programs * list_size, dtype=list_dtype, device=x.device)
    groups, group_ends = 0, None
    if not _slices_lie_in_groups(in_features, slices, weights.group_size):
        groups = (slice_size - 1) // weights.group_size + 2
        group_ends = torch.empty(programs * groups, dtype=torch.int32, device=x.device)
    partial = torch.empty((slices, rows, sum(out_features)), dtype=torch.float32, device=x.device)
    lanes = 32 * configuration.num_warps
    # Where a branch without a scale points to.
    some_scale = next((branch.scale for branch in branches if branch.scale is not None), None)
    nvidia = x.is_cuda and torch.version.hip is None
    word_bytes = weights.tensors[0].element_size()
    hold = hold_instructions(configuration.unroll, word_bytes, configuration.lane_bytes) if nvidia else None
    partial_sums_kernel[(blocks, slices)](
        x,
        in_features,
        lists,
        list_size,
        group_ends,
        groups,
        *_weight_arguments(branches),
        partial,
        out_features,
        tuple(branch.threshold for branch in branches),
        tuple(branch.mode for branch in branches),
        tuple(some_scale if branch.scale is None else branch.scale for branch in branches),
        0,
        ROWS=rows,
        LANES=lanes,
        STEPS=min(MAX_STEPS, triton.next_power_of_2(triton.cdiv(slice_size, lanes))),
        BLOCK_N=block_n,
        UNROLL=configuration.unroll,
        WHOLE_BLOCKS=all(features % block_n == 0 for features in out_features),
        FIXED_POINT=fixed_point,
        SLICE_SIZE=slice_size if fixed_point else None,
        HAS_SCALE=None if some_scale is None else tuple(branch.scale is not None for branch in branches),
        HOLD=hold,
        num_warps=configuration.num_warps,
        PARTS=weights.columns_per_word,
        WORDS_PER_TILE=weights.words_per_tile,
        GROUP_SIZE=weights.group_size or in_features,
        CONSTANTS=(*weights.constants, x.dtype == torch.float32),
        **_format_functions(format),
        **_early_launch(x.device),
    )
    return partial


def _slices_lie_in_groups(in_features: int, slices: int, group_size: int | None) -> bool:
    """Whether no slice holds channels of two groups."""
    if group_size is None or group_size == in_features:
        return True
    return in_features % slices == 0 and group_size % (in_features // slices) == 0


def _add_partial_sums(
    x: Tensor, partial: Tensor, biases: Sequence[Tensor | None], outs: Sequence[Tensor], sum_block: int
) -> None:
    slices, rows, _ = partial.shape
    add_partial_sums_kernel[(sum(triton.cdiv(out.shape[1], sum_block) for out in outs), rows)](
        partial,
        slices,
        _contiguous(biases),
        tuple(outs),
        tuple(out.shape[1] for out in outs),
        SLICES_CEIL=triton.next_power_of_2(slices),
        BLOCK_N=sum_block,
        num_warps=SUM_WARPS,
        **_early_launch(x.device),
    )


def _launch_dense(
    x: Tensor,
    branches: Sequence[Branch],
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    configuration: DenseConfiguration | None,
) -> None:
    out_features = tuple(branch.out_features for branch in branches)
    configuration = configuration or dense_configuration_for(x, sum(out_features))
    block_n = configuration.block_n
    with _on_device(x):
        dense_kernel[(sum(triton.cdiv(features, block_n) for features in out_features),)](
            x,
            x.shape[1],
            *_weight_arguments(branches),
            _contiguous(biases),
            tuple(outs),
            out_features,
            BLOCK_N=block_n,
            BLOCK_K=configuration.block_k,
            num_warps=configuration.num_warps,
            **_early_launch(x.device),
        )


def _weight_arguments(branches: Sequence[Branch]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The `weights` and `strides` of the kernels."""
    tensors = zip(*(branch.weights.tensors for branch in branches), strict=True)
    strides = zip(*(branch.weights.strides for branch in branches), strict=True)
    return tuple(tensors), tuple(strides)


def _format_functions(format: str) -> dict[str, Any]:
    functions = FORMAT_FUNCTIONS[format]
    return {
        "READ": functions.read,
        "UNPACK": functions.unpack,
        "LOAD_SCALES": functions.load_scales,
        "APPLY_SCALES": functions.apply_scales,
    }


def _contiguous(biases: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if bias is None else bias.contiguous() for bias in biases)


def _early_launch(device: torch.device) -> dict[str, bool]:
    return {"LAUNCH_EARLY": True, "launch_pdl": True} if supports_early_launch(device) else {"LAUNCH_EARLY": False}


def _on_device(x: Tensor) -> torch.cuda.device:
    # Triton launches on the current device. Index -1 changes nothing.
    return torch.cuda.device(x.device if x.is_cuda else -1)
