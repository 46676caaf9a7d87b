"""Launches the kernels of a mixture of experts: `library.sparse_experts` on a GPU."""

from typing import Any

import torch
import triton
from torch import Tensor

from .branches import MAX_ROWS
from .configurations import LaunchConfiguration, device_key, rule_of_thumb
from .experts import expert_hidden_kernel, expert_outputs_kernel, expert_partial_sums_kernel
from .launch import MAX_STEPS, SUM_WARPS, _early_launch, _on_device
from .memory import hold_instructions


def sparse_experts(
    x: Tensor,
    chosen: Tensor,
    routing: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    thresholds: Tensor,
    modes: Tensor,
    activation: str,
    configuration: LaunchConfiguration | None = None,
) -> Tensor:
    """See `reference.sparse_experts`. Launches for all chosen experts: gate and up, their sums, down, its sums.

    Raises:
        ValueError: if there are too many rows, or the weights do not lie input-channel-major.
    """
    experts, hidden_features, in_features = down.shape[0], down.shape[2], x.shape[-1]
    rows, choices = chosen.shape
    if rows > MAX_ROWS:
        raise ValueError(f"sparse kernels take up to {MAX_ROWS} rows, got {rows}")
    for weight in (gate_up, down):
        if weight.stride(1) != 1 or weight.stride(2) < weight.shape[1]:
            raise ValueError(f"weights of experts must lie input-channel-major; got strides {weight.stride()}")
        if weight.device != x.device:
            raise ValueError(f"weight on {weight.device}, input on {x.device}")
    x, chosen, routing = x.contiguous(), chosen.contiguous(), routing.contiguous()
    hidden = x.new_empty((rows * choices, hidden_features))
    out = x.new_empty((rows, down.shape[1]))
    if rows == 0:
        return out
    routed = {"chosen": chosen, "experts": experts, **_early_launch(x.device)}
    with _on_device(x):
        both = (hidden_features, hidden_features)
        partial, block = _partial_sums(x, choices, gate_up, both, thresholds[:2], modes[:2], routed, configuration)
        expert_hidden_kernel[(triton.cdiv(hidden_features, block), rows * choices)](
            partial,
            partial.shape[0],
            bias=gate_up_bias,
            out=hidden,
            features=hidden_features,
            SLICES_CEIL=triton.next_power_of_2(partial.shape[0]),
            BLOCK_N=block,
            ACTIVATION=activation,
            num_warps=SUM_WARPS,
            **routed,
        )
        partial, block = _partial_sums(
            hidden, 1, down, (in_features,), thresholds[2:], modes[2:], routed, configuration
        )
        expert_outputs_kernel[(triton.cdiv(in_features, block), rows)](
            partial,
            partial.shape[0],
            routing=routing,
            bias=down_bias,
            out=out,
            features=in_features,
            PAIRS_PER_ROW=choices,
            SLICES_CEIL=triton.next_power_of_2(partial.shape[0]),
            BLOCK_N=block,
            num_warps=SUM_WARPS,
            **routed,
        )
    return out


def _partial_sums(
    x: Tensor,
    pairs_per_row: int,
    weight: Tensor,
    out_features: tuple[int, ...],
    thresholds: Tensor,
    modes: Tensor,
    routed: dict[str, Any],
    configuration: LaunchConfiguration | None,
) -> tuple[Tensor, int]:
    """The partial sums of every pair, and how many columns a program that adds them has."""
    rows, in_features = x.shape
    pairs = rows * pairs_per_row
    bits = 8 * weight.element_size()
    if configuration is None:
        # As many programs as one layer of that many outputs.
        configuration = rule_of_thumb(device_key(x.device), 1, in_features, out_features * pairs, bits)
    block_n = configuration.block_n(bits)
    blocks = sum(triton.cdiv(features, block_n) for features in out_features)
    slices = min(configuration.slices, in_features)
    slice_size = triton.cdiv(in_features, slices)
    list_size = triton.cdiv(slice_size + 2 * configuration.unroll, 16) * 16
    list_dtype = torch.int16 if slice_size <= torch.iinfo(torch.int16).max else torch.int32
    lists = torch.empty(pairs * slices * blocks * list_size, dtype=list_dtype, device=x.device)
    partial = torch.empty((slices, pairs, sum(out_features)), dtype=torch.float32, device=x.device)
    lanes = 32 * configuration.num_warps
    nvidia = x.is_cuda and torch.version.hip is None
    hold = hold_instructions(configuration.unroll, bits // 8, configuration.lane_bytes) if nvidia else None
    expert_partial_sums_kernel[(blocks, slices, pairs)](
        x,
        in_features,
        lists=lists,
        list_size=list_size,
        weights=weight,
        expert_stride=weight.stride(0),
        channel_stride=weight.stride(2),
        partial=partial,
        out_features=out_features,
        thresholds=thresholds,
        modes=modes,
        zero=0,
        PAIRS_PER_ROW=pairs_per_row,
        LANES=lanes,
        STEPS=min(MAX_STEPS, triton.next_power_of_2(triton.cdiv(slice_size, lanes))),
        BLOCK_N=block_n,
        UNROLL=configuration.unroll,
        WHOLE_BLOCKS=all(features % block_n == 0 for features in out_features),
        HOLD=hold,
        CONSTANTS=(True, x.dtype == torch.float32),
        num_warps=configuration.num_warps,
        **routed,
    )
    return partial, configuration.sum_block
