"""Random problems for the sparse kernels, and their solution in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative error of a result that is accumulated in float32 and rounded once to the type.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass
class Layer:
    """Weights `[out_features, in_features]`, input-channel-major, and what to prune."""

    weight: Tensor
    bias: Tensor | None
    threshold: float
    mode: float
    scale: Tensor | None = None


def random_layer(
    generator: torch.Generator,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    threshold: float = 0.7,
    mode: float = 0.0,
    with_bias: bool = True,
    padding: int = 0,
) -> Layer:
    weight = torch.randn(in_features, out_features, generator=generator) / in_features**0.5
    stored = torch.full((in_features, out_features + padding), torch.nan, dtype=dtype, device=DEVICE)
    stored[:, :out_features] = weight.to(dtype)
    bias = torch.randn(out_features, generator=generator).to(DEVICE) if with_bias else None
    return Layer(stored[:, :out_features].t(), bias, float(torch.tensor(threshold)), float(torch.tensor(mode)))


def random_input(generator: torch.Generator, rows: int, in_features: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, in_features, generator=generator).to(DEVICE, dtype)


def expected(x: Tensor, layer: Layer) -> Tensor:
    """The formula in float64; what is kept is decided in float32."""
    centered = x.float() - torch.tensor(layer.mode, dtype=torch.float32, device=x.device)
    distance = centered.abs() if layer.scale is None else layer.scale * centered.abs()
    keep = ~(distance <= torch.tensor(layer.threshold, dtype=torch.float32, device=x.device))
    y = torch.where(keep, centered.double(), 0.0) @ layer.weight.double().t()
    return y if layer.bias is None else y + layer.bias.double()


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    """Finite values agree within rounding, and NaN and infinities stand at the same places."""
    tolerance = TOLERANCE[actual.dtype]
    wanted = wanted.to(actual.dtype).double() if not torch.isfinite(wanted).all() else wanted
    actual = actual.double()
    assert actual.shape == wanted.shape
    finite = torch.isfinite(wanted)
    assert torch.equal(torch.isfinite(actual), finite)
    assert torch.equal(torch.isnan(actual), torch.isnan(wanted))
    difference = torch.where(finite, actual - wanted, 0.0).norm()
    # Sums of terms of the order of one: rounding in float32 stays, however small the sum.
    assert difference <= tolerance * torch.where(finite, wanted, 0.0).norm() + 2e-6 * wanted.numel() ** 0.5
