"""The criterion of `core.criterion`, in PyTorch."""

import torch
from torch import Tensor


def pruned_mask(x: Tensor, mode: float, threshold: float, scale: Tensor | None = None) -> Tensor:
    """Which elements of `x` `[..., in_features]` are pruned: a bool tensor of the same shape."""
    distance = (x.float() - mode).abs()
    return (distance if scale is None else distance * scale) <= threshold


def prune(x: Tensor, mode: float, threshold: float, scale: Tensor | None = None) -> Tensor:
    """`x` with `mode` in place of every element that is pruned. Gradients pass through what is kept."""
    pruned = pruned_mask(x, mode, threshold, scale)
    return torch.where(pruned, torch.full((), mode, dtype=x.dtype, device=x.device), x)
