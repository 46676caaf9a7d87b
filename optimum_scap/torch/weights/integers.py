"""Weights as integers with a scale per group of input channels: what checkpoints of quantized models come down to.

    w[o, i] = (q[o, i] - z[o, g]) s[o, g]        z integers, or zero where there are none
    w[o, i] = q[o, i] s[o, g] + z[o, g]          z floating-point: offsets
    g = i // group_size                          group_size = in_features / groups

in float32, rounded once to the type wanted. The first is what GPTQ, AWQ, compressed-tensors (`pack-quantized`,
`int-quantized`) and GGUF's Q4_0 and Q8_0 store, the second GGUF's Q4_1 and torch's `_weight_int4pack_mm`.
"""

from typing import NamedTuple

import torch
from torch import Tensor


BITS = (4, 8)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class IntegerWeights(NamedTuple):
    """The weights of one layer, in no layout of a kernel.

    Args:
        bits: 4 or 8.
        integers: `[out_features, in_features]`. int8 without zero points, from -8 to 7 or from -128 to 127; uint8 with
            zero points or offsets, from 0 to 15 or from 0 to 255.
        scales: `[out_features, groups]`; float16, bfloat16 or float32.
        zero_points: None, or `[out_features, groups]`: integers from 0 to 255, or floating-point offsets.
    """

    bits: int
    integers: Tensor
    scales: Tensor
    zero_points: Tensor | None = None

    @property
    def group_size(self) -> int:
        """Neighboring input channels that share a scale; in_features if there is one scale per output channel."""
        return self.integers.shape[1] // max(1, self.scales.shape[1])


def check(weights: IntegerWeights) -> None:
    """Looks at types and shapes, not at values.

    Raises:
        ValueError: these are no weights; says which tensor is wrong, and how.
    """
    bits, integers, scales, zero_points = weights
    if bits not in BITS:
        raise ValueError(f"integers of {bits} bits are not supported, only of 4 or 8")
    wanted = torch.int8 if zero_points is None else torch.uint8
    if integers.dtype != wanted or integers.dim() != 2:
        having = "without zero points" if zero_points is None else "with zero points or offsets"
        raise ValueError(
            f"integers {having} must be {wanted} of shape [out_features, in_features], got {integers.dtype} of shape "
            f"{tuple(integers.shape)}"
        )
    out_features, in_features = integers.shape
    if scales.dtype not in SCALE_DTYPES or scales.dim() != 2 or scales.shape[0] != out_features:
        raise ValueError(
            f"scales must be floating-point of 16 or 32 bits and of shape [{out_features}, groups], got "
            f"{scales.dtype} of shape {tuple(scales.shape)}"
        )
    groups = scales.shape[1]
    if groups == 0 or in_features % groups != 0:
        raise ValueError(f"{in_features} input channels cannot be divided into {groups} groups of equal size")
    if zero_points is None:
        return
    if zero_points.shape != scales.shape:
        raise ValueError(
            f"zero points must have the shape of the scales, {tuple(scales.shape)}; got {tuple(zero_points.shape)}"
        )
    if zero_points.is_floating_point() and zero_points.dtype not in SCALE_DTYPES or zero_points.dtype == torch.bool:
        raise ValueError(f"zero points must be integers or floating-point of 16 or 32 bits, got {zero_points.dtype}")


def dequantize(weights: IntegerWeights, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[out_features, in_features]`, computed in float32 and rounded once to `dtype`.

    Raises:
        ValueError: see `check`.
    """
    check(weights)
    out_features, in_features = weights.integers.shape
    integers = weights.integers.view(out_features, weights.scales.shape[1], weights.group_size).float()
    return (
        apply_scales(integers, weights.scales[:, :, None], _each(weights.zero_points))
        .to(dtype)
        .view(out_features, in_features)
    )


def apply_scales(integers: Tensor, scales: Tensor, zero_points: Tensor | None) -> Tensor:
    """The formula, in float32, of tensors that broadcast; `integers` are float32 and are overwritten."""
    if zero_points is None:
        return integers.mul_(scales.float())
    if zero_points.is_floating_point():
        return integers.mul_(scales.float()).add_(zero_points.float())
    return integers.sub_(zero_points.float()).mul_(scales.float())


def _each(zero_points: Tensor | None) -> Tensor | None:
    return None if zero_points is None else zero_points[:, :, None]
