"""The plain torch twins of the kernels: what they compute, what runs on the CPU, and what the tests compare with.

    keep_i = |x_i - m| > t                  compared in float32, strictly greater; NaN is kept
    y      = sum over kept i of (x_i - m) W[:, i]  +  bias

(SCAP, arXiv 2412.07174, section 3; `bias` holds the folded mode, b + m * W·1.)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def _sparse_linear_float32(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float, mode: float) -> Tensor:
    centred = x.float() - mode
    kept = torch.where(centred.abs() <= threshold, 0.0, centred)
    # With mode 0 what is kept is x itself: the product needs no copy of the weights in float32.
    y = F.linear(kept.to(x.dtype), weight).float() if mode == 0.0 else F.linear(kept, weight.float())
    return y if bias is None else y + bias.float()


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float, mode: float) -> Tensor:
    """A linear layer that reads only the weights of the kept input channels.

    Args:
        x: `[..., in_features]`, up to 8 rows.
        weight: `[out_features, in_features]`, input-channel-major in memory: strides (1, >= out_features).
        bias: `[out_features]`, with the folded mode in it.
        threshold: t of the formula, a float32 value. Below zero every channel is kept.
        mode: m of the formula, a float32 value.

    Returns:
        `[..., out_features]` of the type of `x`, accumulated in float32.
    """
    return _sparse_linear_float32(x, weight, bias, threshold, mode).to(x.dtype)


def sparse_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    thresholds: Sequence[float],
    modes: Sequence[float],
) -> list[Tensor]:
    """Several sparse linear layers over one input (`q`, `k`, `v`), each with its own threshold and mode."""
    return [sparse_linear(x, *layer) for layer in zip(weights, biases, thresholds, modes, strict=True)]


def linear_group(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Several dense linear layers over one token.

    Args:
        x: `[..., in_features]`, one row.
        weights: `[out_features, in_features]` each, output-channel-major in memory, as nn.Linear has them.
        biases: `[out_features]` or None each.
    """
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


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
) -> Tensor:
    """activation(gate(x)) * up(x), rounded once; `activation` is one of ACTIVATIONS."""
    gate = _sparse_linear_float32(x, gate_weight, gate_bias, gate_threshold, gate_mode)
    up = _sparse_linear_float32(x, up_weight, up_bias, up_threshold, up_mode)
    return (ACTIVATIONS[activation](gate) * up).to(x.dtype)
