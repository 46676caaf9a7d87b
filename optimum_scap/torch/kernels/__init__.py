"""The sparse operations that decode runs on."""

import torch
from torch import Tensor
from torch.nn import functional as F


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, threshold: float, mode: float = 0.0
) -> Tensor:
    """Sum over the kept channels i of (x_i - mode) * weight[:, i], plus bias; x_i is kept if |x_i - mode| > threshold.

    Args:
        x: `[..., in_features]`, float32, float16 or bfloat16; the comparison is in float32, a NaN is kept.
        weight: `[out_features, in_features]` of the same dtype.
        bias: `[out_features]` with the mode folded in, of any float dtype.
        threshold: float32 value.
        mode: float32 value.

    Returns:
        `[..., out_features]` in the dtype of `x`, accumulated in float32.
    """
    centred = x.float() - mode
    kept = torch.where(centred.abs() <= threshold, 0.0, centred)
    return F.linear(kept, weight.float(), None if bias is None else bias.float()).to(x.dtype)
