"""Layers over float32, float16 and bfloat16 weights, in Triton. Their torch twins stand in `reference`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .configurations import (
    DenseConfiguration,
    LaunchConfiguration,
    configuration_for,
    dense_configuration_for,
    supports_early_launch,
)
from .device_functions import hold_instructions
from .linear import add_gated_partial_sums_kernel, add_partial_sums_kernel, dense_kernel, partial_sums_kernel


MAX_ROWS = 8
MAX_STEPS = 16
SUM_WARPS = 4
# Layers over one input that one launch computes.
MAX_BRANCHES = 3


class _Branch(NamedTuple):
    """One weight over the shared input."""

    weight: Tensor
    threshold: float
    mode: float


def _check(x: Tensor, branches: Sequence[_Branch]) -> None:
    rows = x.numel() // max(1, x.shape[-1])
    if rows > MAX_ROWS:
        raise ValueError(f"sparse kernels take up to {MAX_ROWS} rows, got {rows}")
    for weight, _, _ in branches:
        out_features, in_features = weight.shape
        if in_features != x.shape[-1]:
            raise ValueError(f"weight of {in_features} input channels, input of {x.shape[-1]}")
        if out_features > 1 and weight.stride(0) != 1 or in_features > 1 and weight.stride(1) < out_features:
            raise ValueError(
                f"weights must lie input-channel-major, with strides (1, >= {out_features}); got {weight.stride()}"
            )
        if weight.device != x.device:
            raise ValueError(f"weight on {weight.device}, input on {x.device}")


def _partial_sums(x: Tensor, branches: Sequence[_Branch], configuration: LaunchConfiguration) -> Tensor:
    """Launches `partial_sums_kernel`; x is [rows, in_features], contiguous."""
    rows, in_features = x.shape
    weights = tuple(branch.weight for branch in branches)
    weight_bytes = weights[0].element_size()
    block_n = configuration.block_n(weight_bytes)
    out_features = tuple(weight.shape[0] for weight in weights)
    blocks = sum(triton.cdiv(features, block_n) for features in out_features)
    slices = min(configuration.slices, in_features)
    slice_size = triton.cdiv(in_features, slices)
    list_size = triton.cdiv(slice_size + 2 * configuration.unroll, 16) * 16
    list_dtype = torch.int16 if slice_size <= torch.iinfo(torch.int16).max else torch.int32
    lists = torch.empty(slices * blocks * list_size, dtype=list_dtype, device=x.device)
    partial = torch.empty((slices, rows, sum(out_features)), dtype=torch.float32, device=x.device)
    lanes = 32 * configuration.num_warps
    nvidia = x.is_cuda and torch.version.hip is None
    partial_sums_kernel[(blocks, slices)](
        x,
        in_features,
        lists,
        list_size,
        weights,
        tuple(weight.stride(1) for weight in weights),
        partial,
        out_features,
        tuple(branch.threshold for branch in branches),
        tuple(branch.mode for branch in branches),
        0,
        ROWS=rows,
        LANES=lanes,
        STEPS=min(MAX_STEPS, triton.next_power_of_2(triton.cdiv(slice_size, lanes))),
        BLOCK_N=block_n,
        UNROLL=configuration.unroll,
        WHOLE_BLOCKS=all(features % block_n == 0 for features in out_features),
        HOLD=hold_instructions(configuration.unroll, weight_bytes) if nvidia else None,
        num_warps=configuration.num_warps,
        **_early_launch(x.device),
    )
    return partial


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


def _launch(
    x: Tensor,
    branches: Sequence[_Branch],
    biases: Sequence[Tensor | None],
    configuration: LaunchConfiguration | None,
) -> list[Tensor]:
    _check(x, branches)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    outs = [flat.new_empty((flat.shape[0], branch.weight.shape[0])) for branch in branches]
    if flat.shape[0] > 0:
        configuration = configuration or configuration_for(flat, [branch.weight for branch in branches])
        with _on_device(flat):
            partial = _partial_sums(flat, branches, configuration)
            _add_partial_sums(flat, partial, biases, outs, configuration.sum_block)
    return [out.view(*x.shape[:-1], out.shape[1]) for out in outs]


def _contiguous(biases: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if bias is None else bias.contiguous() for bias in biases)


def _early_launch(device: torch.device) -> dict[str, bool]:
    return {"LAUNCH_EARLY": True, "launch_pdl": True} if supports_early_launch(device) else {"LAUNCH_EARLY": False}


def _on_device(x: Tensor) -> torch.cuda.device:
    # Triton launches on the current device. Index -1 changes nothing.
    return torch.cuda.device(x.device if x.is_cuda else -1)


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: float,
    mode: float,
    configuration: LaunchConfiguration | None = None,
) -> Tensor:
    """See `reference.sparse_linear`."""
    return _launch(x, [_Branch(weight, threshold, mode)], [bias], configuration)[0]


def sparse_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[float],
    modes: Sequence[float],
    configuration: LaunchConfiguration | None = None,
) -> list[Tensor]:
    """See `reference.sparse_linear_group`."""
    branches = [_Branch(*branch) for branch in zip(weights, thresholds, modes, strict=True)]
    outs = []
    for first in range(0, len(branches), MAX_BRANCHES):
        together = slice(first, first + MAX_BRANCHES)
        outs += _launch(x, branches[together], biases[together], configuration)
    return outs


def linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    configuration: DenseConfiguration | None = None,
) -> list[Tensor]:
    """See `reference.linear_group`."""
    _check_dense(x, weights)
    outs = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    flat = x.reshape(-1).contiguous()
    for first in range(0, len(weights), MAX_BRANCHES):
        together = slice(first, first + MAX_BRANCHES)
        _launch_dense(flat, weights[together], biases[together], outs[together], configuration)
    return outs


def _check_dense(x: Tensor, weights: Sequence[Tensor]) -> None:
    if x.numel() != x.shape[-1]:
        raise ValueError(f"the dense kernel takes one row, got an input of shape {tuple(x.shape)}")
    for weight in weights:
        out_features, in_features = weight.shape
        if in_features != x.shape[-1]:
            raise ValueError(f"weight of {in_features} input channels, input of {x.shape[-1]}")
        if in_features > 1 and weight.stride(1) != 1 or out_features > 1 and weight.stride(0) < in_features:
            raise ValueError(
                f"weights must lie output-channel-major, with strides (>= {in_features}, 1); got {weight.stride()}"
            )
        if weight.device != x.device:
            raise ValueError(f"weight on {weight.device}, input on {x.device}")


def _launch_dense(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    configuration: DenseConfiguration | None,
) -> None:
    configuration = configuration or dense_configuration_for(x, sum(out.shape[-1] for out in outs))
    with _on_device(x):
        dense_kernel[(sum(triton.cdiv(out.shape[-1], configuration.block_n) for out in outs),)](
            x,
            x.shape[0],
            tuple(weights),
            tuple(weight.stride(0) for weight in weights),
            _contiguous(biases),
            tuple(outs),
            tuple(out.shape[-1] for out in outs),
            BLOCK_N=configuration.block_n,
            BLOCK_K=configuration.block_k,
            num_warps=configuration.num_warps,
            **_early_launch(x.device),
        )


def sparse_gated_linear(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    gate_threshold: float,
    up_threshold: float,
    gate_mode: float,
    up_mode: float,
    activation: str,
    configuration: LaunchConfiguration | None = None,
) -> Tensor:
    """See `reference.sparse_gated_linear`."""
    branches = [_Branch(gate_weight, gate_threshold, gate_mode), _Branch(up_weight, up_threshold, up_mode)]
    _check(x, branches)
    features = gate_weight.shape[0]
    if up_weight.shape[0] != features:
        raise ValueError(f"gate has {features} output features, up has {up_weight.shape[0]}")
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out = flat.new_empty((flat.shape[0], features))
    if flat.shape[0] > 0:
        configuration = configuration or configuration_for(flat, [gate_weight, up_weight])
        with _on_device(flat):
            partial = _partial_sums(flat, branches, configuration)
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
