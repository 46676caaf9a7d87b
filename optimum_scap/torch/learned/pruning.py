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


class Measured:
    """The sparsity of every group over the tokens of a step, and its slope with respect to the log threshold.

    The latter is known when gradients are: both come of the same numbers.
    """

    def __init__(self) -> None:
        self._pruned: dict[str, tuple[Tensor, int]] = {}
        self._slopes: dict[str, Tensor] = {}

    def add(self, key: str, pruned: Tensor) -> None:
        """Adds which elements of `[..., in_features]` that enter a group are pruned."""
        count, elements = pruned.sum(), pruned.numel()
        if key in self._pruned:
            count, elements = self._pruned[key][0] + count, self._pruned[key][1] + elements
        self._pruned[key] = (count, elements)

    def add_slope(self, key: str, slope: Tensor) -> None:
        """Adds the sum of the slopes of all elements of a call."""
        self._slopes[key] = self._slopes[key] + slope if key in self._slopes else slope

    def sparsities(self) -> dict[str, float]:
        """By group key; of groups that a token reached."""
        return {key: float(count) / elements for key, (count, elements) in self._pruned.items()}

    def slopes(self) -> dict[str, Tensor]:
        """By group key, where the group is; of thresholds that took gradients."""
        return {key: slope / self._pruned[key][1] for key, slope in self._slopes.items()}


def prune_learned(
    x: Tensor,
    log_threshold: Tensor,
    mode: float,
    scale: Tensor | None = None,
    gain: Tensor | None = None,
    measured: tuple[Measured, str] | None = None,
) -> Tensor:
    """`x` `[..., in_features]` pruned, and multiplied by the gains.

    Args:
        x: activations of any float type.
        log_threshold: float32 scalar.
        mode: what a pruned activation stands for.
        scale: of the criterion, float32 `[in_features]`, or None.
        gain: float32 `[in_features]`, or None.
        measured: where to add the sparsity, and under which key.
    """
    pruned: Tensor = _Prune.apply(x, log_threshold, mode, scale, gain, measured)
    return pruned


class _Prune(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_threshold: Tensor,
        mode: float,
        scale: Tensor | None,
        gain: Tensor | None,
        measured: tuple[Measured, str] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, log_threshold, scale, gain)
        ctx.mode, ctx.measured = mode, measured
        pruned = _ratio(x, log_threshold, mode, scale) <= 1
        if measured is not None:
            measured[0].add(measured[1], pruned)
        kept = x.masked_fill(pruned, mode)
        return kept if gain is None else kept.mul_(gain.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, log_threshold, scale, gain = ctx.saved_tensors
        (gradient,) = gradients
        ratio = _ratio(x, log_threshold, ctx.mode, scale)
        pruned = ratio <= 1
        of_gain = of_threshold = of_x = None
        if gain is not None:
            product = x.masked_fill(pruned, ctx.mode).float().mul_(gradient)
            of_gain = product.reshape(-1, x.shape[-1]).sum(dim=0)
            gradient = gradient * gain.to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            slopes = _slope(ratio).mul_(ratio)
            if ctx.measured is not None:
                ctx.measured[0].add_slope(ctx.measured[1], slopes.sum())
            slopes.mul_(x - ctx.mode if ctx.mode else x)
            of_threshold = -torch.dot(slopes.view(-1), gradient.reshape(-1).float())
        if ctx.needs_input_grad[0]:
            of_x = gradient.masked_fill(pruned, 0)
        return of_x, of_threshold, None, None, of_gain, None


def _ratio(x: Tensor, log_threshold: Tensor, mode: float, scale: Tensor | None) -> Tensor:
    """How many thresholds every element is away from the mode; what is at most one is pruned, NaN is not."""
    distance = (x.float() - mode).abs_() if mode else x.float().abs()
    if scale is not None:
        distance.mul_(scale)
    return distance.mul_(torch.exp(-log_threshold))


def _slope(ratio: Tensor) -> Tensor:
    """S'(r - 1)."""
    sigmoid = torch.mul(ratio, 1 / WIDTH).sub_(1 / WIDTH).sigmoid_()
    return sigmoid.sub_(sigmoid * sigmoid).div_(WIDTH)
