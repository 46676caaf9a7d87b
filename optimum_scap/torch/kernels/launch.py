"""Launches the Triton kernels: the operations of `library` on a GPU. What they compute stands in `reference`."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..weights import KernelArguments, find_format
from ..weights.packed import PackedFormat
from .branches import Branch, dense_branches, launches, outputs, row_of, rows_of, sparse_branches
from .configurations import (
    DenseConfiguration,
    LaunchConfiguration,
    configuration_for,
    dense_configuration_for,
    supports_early_launch,
)
from .plans import (
    MAX_STEPS as MAX_STEPS,
)
from .plans import (
    SUM_WARPS as SUM_WARPS,
)
from .plans import (
    Stored,
    launch_options,
    plan_dense,
    plan_dequantization,
    plan_gated_sums,
    plan_sparse,
    plan_sums,
)


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
            slices, rows, _ = partial.shape
            launch = plan_gated_sums(x.device, slices, rows, features, configuration.sum_block, x.dtype, activation)
            both = _contiguous([gate_bias, up_bias])
            launch((*both, out), partial, slices, *both, out, features)
    return out.view(*x.shape[:-1], features)


def integer_linear(x: Tensor, weights: Sequence[Tensor], format: str, bias: Tensor | None) -> Tensor:
    """See `reference.integer_linear`."""
    weight_format = find_format(format)
    assert isinstance(weight_format, PackedFormat)
    out_features, in_features = weight_format.shape(weights)
    if in_features != x.shape[-1]:
        raise ValueError(f"weight of {in_features} input channels, input of {x.shape[-1]}")
    arguments = weight_format.kernel_arguments(weights, input_major=True)
    flat = x.reshape(-1, in_features)
    blocks = list(weight_format.blocks(weights, x.dtype))
    with _on_device(x):
        if len(blocks) == 1:
            weight = x.new_empty((in_features, out_features))
            _dequantize(arguments, format, weight, out_features, *blocks[0])
            out = _multiply(flat, weight, bias)
        else:
            out = x.new_empty((flat.shape[0], out_features))
            memory = x.new_empty((in_features, max((end - begin for begin, end in blocks), default=0)))
            for begin, end in blocks:
                weight = memory[:, : end - begin]
                _dequantize(arguments, format, weight, out_features, begin, end)
                _multiply(flat, weight, None if bias is None else bias[begin:end], out[:, begin:end])
    return out.view(*x.shape[:-1], out_features)


def _dequantize(
    arguments: KernelArguments, format: str, weight: Tensor, out_features: int, begin: int, end: int
) -> None:
    """Writes the output channels from `begin` to `end` to `weight` `[in_features, end - begin]`."""
    in_features = weight.shape[0]
    stored = Stored.of([Branch(arguments, out_features)])
    launch = plan_dequantization(weight.device, in_features, begin, end, weight.dtype, format, stored)
    launch(
        (*arguments.tensors, weight),
        arguments.tensors,
        arguments.strides,
        weight,
        weight.stride(0),
        begin // arguments.columns_per_word,
        end,
        in_features,
        out_features,
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    if bias is None:
        return torch.mm(x, weight, out=out)
    return torch.addmm(bias.to(x.dtype), x, weight, out=out)


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
    stored = Stored.of(branches)
    plan = plan_sparse(x.device, rows, in_features, x.dtype, format, stored, configuration)
    lists = torch.empty(plan.lists, dtype=plan.list_dtype, device=x.device)
    group_ends = None
    if plan.group_ends > 0:
        group_ends = torch.empty(plan.group_ends, dtype=torch.int32, device=x.device)
    partial = torch.empty((plan.slices, rows, plan.columns), dtype=torch.float32, device=x.device)
    # Where a branch without a scale points to.
    some_scale = next((branch.scale for branch in branches if branch.scale is not None), None)
    scales = tuple([some_scale if branch.scale is None else branch.scale for branch in branches])
    weights, strides = _weight_arguments(branches)
    plan.launch(
        (x, *(tensor for tensors in weights for tensor in tensors), *scales),
        x,
        in_features,
        lists,
        plan.list_size,
        group_ends,
        plan.groups,
        weights,
        strides,
        partial,
        stored.out_features,
        tuple([branch.threshold for branch in branches]),
        tuple([branch.mode for branch in branches]),
        scales,
        0,
    )
    return partial


def _add_partial_sums(
    x: Tensor, partial: Tensor, biases: Sequence[Tensor | None], outs: Sequence[Tensor], sum_block: int
) -> None:
    slices, rows, _ = partial.shape
    out_features = tuple([out.shape[1] for out in outs])
    launch = plan_sums(x.device, slices, rows, out_features, sum_block, x.dtype)
    biases, outs = _contiguous(biases), tuple(outs)
    launch((*biases, *outs), partial, slices, biases, outs, out_features)


def _launch_dense(
    x: Tensor,
    branches: Sequence[Branch],
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    configuration: DenseConfiguration | None,
) -> None:
    stored = Stored.of(branches)
    configuration = configuration or dense_configuration_for(x, sum(stored.out_features))
    launch = plan_dense(x.device, x.shape[1], x.dtype, stored, configuration)
    weights, strides = _weight_arguments(branches)
    biases, outs = _contiguous(biases), tuple(outs)
    with _on_device(x):
        launch(
            (x, *(tensor for tensors in weights for tensor in tensors), *biases, *outs),
            x,
            x.shape[1],
            weights,
            strides,
            biases,
            outs,
            stored.out_features,
        )


def _weight_arguments(branches: Sequence[Branch]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The `weights` and `strides` of the kernels."""
    tensors = zip(*(branch.weights.tensors for branch in branches), strict=True)
    strides = zip(*(branch.weights.strides for branch in branches), strict=True)
    return tuple(tensors), tuple(strides)


def _contiguous(biases: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if bias is None else bias.contiguous() for bias in biases)


def _early_launch(device: torch.device) -> dict[str, bool]:
    early = supports_early_launch(device)
    return {"LAUNCH_EARLY": early, **launch_options(early)}


def _on_device(x: Tensor) -> AbstractContextManager[Any]:
    # Triton launches on the current device.
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
