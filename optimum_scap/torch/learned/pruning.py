"""Pruning with gradients for thresholds.

    keep_i = [s_i * |x_i - m| > t]                                  forward, see `core.criterion`
    y_i    = g_i * (m + keep_i * (x_i - m))
    d keep_i / d log t  :=  -r_i * S'(r_i - 1),    r_i = s_i * |x_i - m| / t,    S(u) = 1 / (1 + exp(-u / WIDTH))

The indicator is flat but for a step; its slope with respect to the threshold is taken from a sigmoid around the step.
Gradients of `x` and of the gain are exact: they pass through what is kept.
"""

from typing import Any

import torch
from torch import Tensor


# Of the sigmoid, in thresholds.
WIDTH = 0.15


def prune_learned(
    x: Tensor, log_threshold: Tensor, mode: float, scale: Tensor | None = None, gain: Tensor | None = None
) -> Tensor:
    """`x` `[..., in_features]` pruned, and multiplied by the gains.

    Args:
        x: activations of any float type.
        log_threshold: float32 scalar.
        mode: what a pruned activation stands for.
        scale: of the criterion, float32 `[in_features]`, or None.
        gain: float32 `[in_features]`, or None.
    """
    pruned: Tensor = _Prune.apply(x, log_threshold, mode, scale, gain)
    return pruned


def sparsity_and_slope(
    x: Tensor, log_threshold: Tensor, mode: float, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The fraction of `x` that is pruned, and its slope with respect to the log threshold: two float32 scalars."""
    ratio = _ratio(x, log_threshold, mode, scale)
    return (ratio <= 1).float().mean(), (ratio * _slope(ratio)).mean()


class _Prune(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, log_threshold: Tensor, mode: float, scale: Tensor | None, gain: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, log_threshold, scale, gain)
        ctx.mode = mode
        kept = _kept(x, _ratio(x, log_threshold, mode, scale), mode)
        return kept if gain is None else kept * gain.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, log_threshold, scale, gain = ctx.saved_tensors
        (gradient,) = gradients
        ratio = _ratio(x, log_threshold, ctx.mode, scale)
        of_gain = of_threshold = of_x = None
        if gain is not None:
            product = gradient.float() * _kept(x, ratio, ctx.mode)
            of_gain = product.reshape(-1, x.shape[-1]).sum(dim=0)
            gradient = gradient * gain.to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            of_threshold = -(gradient.float() * (x.float() - ctx.mode) * ratio * _slope(ratio)).sum()
        if ctx.needs_input_grad[0]:
            of_x = torch.where(ratio <= 1, torch.zeros((), dtype=gradient.dtype, device=x.device), gradient)
        return of_x, of_threshold, None, None, of_gain


def _ratio(x: Tensor, log_threshold: Tensor, mode: float, scale: Tensor | None) -> Tensor:
    """How many thresholds every element is away from the mode; what is at most one is pruned, NaN is not."""
    distance = (x.float() - mode).abs() if mode else x.float().abs()
    return (distance if scale is None else distance * scale) * torch.exp(-log_threshold)


def _kept(x: Tensor, ratio: Tensor, mode: float) -> Tensor:
    return torch.where(ratio <= 1, torch.full((), mode, dtype=x.dtype, device=x.device), x)


def _slope(ratio: Tensor) -> Tensor:
    """S'(r - 1)."""
    sigmoid = torch.sigmoid((ratio - 1) / WIDTH)
    return sigmoid * (1 - sigmoid) / WIDTH
