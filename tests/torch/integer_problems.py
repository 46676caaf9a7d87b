"""Random integer weights of every kind, and what they stand for in float64."""

import torch
from torch import Tensor

from optimum_scap.torch.weights import IntegerWeights


KINDS = ("symmetric", "zero points", "offsets")


def random_integers(
    generator: torch.Generator,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    kind: str = "symmetric",
    dtype: torch.dtype = torch.float16,
) -> IntegerWeights:
    """Weights of about the size of 1 / sqrt(in_features)."""
    levels = 1 << bits
    shape, groups = (out_features, in_features), (out_features, in_features // group_size)
    largest = 2 / (levels * in_features**0.5)
    scales = (largest * (0.5 + torch.rand(groups, generator=generator))).to(dtype)
    if kind == "symmetric":
        integers = torch.randint(-levels // 2, levels // 2, shape, generator=generator)
        return IntegerWeights(bits, integers.to(torch.int8), scales)
    integers = torch.randint(0, levels, shape, generator=generator).to(torch.uint8)
    if kind == "zero points":
        zero_points = torch.randint(0, levels + 1, groups, generator=generator).to(torch.uint8)
    else:
        zero_points = (-scales.float() * levels * torch.rand(groups, generator=generator)).to(dtype)
    return IntegerWeights(bits, integers, scales, zero_points)


def in_float64(weights: IntegerWeights) -> Tensor:
    integers = weights.integers.double()
    scales = weights.scales.double().repeat_interleave(weights.group_size, dim=1)
    if weights.zero_points is None:
        return integers * scales
    zero_points = weights.zero_points.double().repeat_interleave(weights.group_size, dim=1)
    if weights.zero_points.is_floating_point():
        return integers * scales + zero_points
    return (integers - zero_points) * scales
