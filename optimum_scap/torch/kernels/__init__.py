"""Sparse layers for decoding: what they compute stands in `reference`, how they do it in `device_functions`.

The functions here are torch operations (`torch.ops.optimum_scap`): Triton on a GPU, plain torch elsewhere. They work
inside torch.compile(fullgraph=True) and CUDA graphs, on any stream, and compute no gradients. Importing this package
does not import Triton.
"""

from collections.abc import Sequence

from torch import Tensor

from ..weights import Weights
from . import library
from .reference import ACTIVATIONS


__all__ = [
    "ACTIVATIONS",
    "linear_group",
    "sparse_experts",
    "sparse_feed_forward",
    "sparse_gated_linear",
    "sparse_linear",
    "sparse_linear_group",
]


def _tensors(*layers: Tensor | Weights) -> tuple[list[Tensor], str]:
    """The tensors of the layers in turn, and the format that all layers share."""
    weights = [Weights("dense", (layer,)) if isinstance(layer, Tensor) else layer for layer in layers]
    formats = {layer.format for layer in weights}
    if len(formats) > 1:
        raise ValueError(f"layers over one input must be of one weight format, got {', '.join(sorted(formats))}")
    return [tensor for layer in weights for tensor in layer.tensors], weights[0].format


def sparse_linear(
    x: Tensor,
    weight: Tensor | Weights,
    bias: Tensor | None = None,
    *,
    threshold: float,
    mode: float = 0.0,
    scale: Tensor | None = None,
) -> Tensor:
    """A linear layer that reads only the weights of the kept input channels, see `reference.sparse_linear`.

    Args:
        x: `[..., in_features]`, up to 8 rows.
        weight: `[out_features, in_features]`, input-channel-major in memory: strides (1, >= out_features); or
            weights of any format of `torch.weights`.
        bias: `[out_features]`, with the folded mode in it: b + m * W·1.
        threshold: channels with scale * |x - mode| > threshold are kept.
        mode: the mode of the activations.
        scale: `[in_features]`, float32, contiguous, on the device of `x`; ones by default.

    Raises:
        ValueError: if `scale` is something else; on a GPU also if the weights do not lie input-channel-major or `x`
            has more than 8 rows.
    """
    return library.run(library.sparse_linear, x, *_tensors(weight), bias, threshold, mode, scale)


def sparse_linear_group(
    x: Tensor,
    weights: Sequence[Tensor | Weights],
    biases: Sequence[Tensor | None],
    *,
    thresholds: Sequence[float],
    modes: Sequence[float],
    scales: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Several sparse linear layers over one input in one go; arguments and errors as of `sparse_linear`."""
    if scales is None:
        scales = [None] * len(thresholds)
    return library.run(library.sparse_linear_group, x, *_tensors(*weights), biases, thresholds, modes, scales)


def linear_group(x: Tensor, weights: Sequence[Tensor | Weights], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Several dense linear layers over one token in one go, see `reference.linear_group`.

    Raises:
        ValueError: on a GPU, if the weights do not lie output-channel-major or `x` has more than one row.
    """
    return library.run(library.linear_group, x, *_tensors(*weights), biases)


def sparse_gated_linear(
    x: Tensor,
    gate_weight: Tensor | Weights,
    up_weight: Tensor | Weights,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    gate_threshold: float,
    up_threshold: float,
    gate_mode: float = 0.0,
    up_mode: float = 0.0,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """activation(gate(x)) * up(x), both layers sparse; arguments and errors as of `sparse_linear`.

    Args:
        activation: one of ACTIVATIONS.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}, choose from {', '.join(ACTIVATIONS)}")
    weights, format = _tensors(gate_weight, up_weight)
    half = len(weights) // 2
    return library.run(
        library.sparse_gated_linear,
        x,
        weights[:half],
        weights[half:],
        format,
        gate_bias,
        up_bias,
        gate_threshold,
        up_threshold,
        gate_mode,
        up_mode,
        gate_scale,
        up_scale,
        activation,
    )


def sparse_experts(
    x: Tensor,
    chosen: Tensor,
    routing: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    thresholds: Tensor,
    modes: Tensor,
    activation: str = "silu",
) -> Tensor:
    """A mixture of experts for a few tokens, see `reference.sparse_experts`.

    Raises:
        ValueError: on an unknown activation; on a GPU, if the weights do not lie input-channel-major or `x` has more
            than 8 rows.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}, choose from {', '.join(ACTIVATIONS)}")
    return library.run(
        library.sparse_experts,
        x,
        chosen,
        routing,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        thresholds,
        modes,
        activation,
    )


def sparse_feed_forward(
    x: Tensor,
    gate_weight: Tensor | Weights,
    up_weight: Tensor | Weights,
    down_weight: Tensor | Weights,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    gate_threshold: float,
    up_threshold: float,
    down_threshold: float,
    gate_mode: float = 0.0,
    up_mode: float = 0.0,
    down_mode: float = 0.0,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """down(activation(gate(x)) * up(x)), all three layers sparse; arguments and errors as of `sparse_gated_linear`."""
    hidden = sparse_gated_linear(
        x,
        gate_weight,
        up_weight,
        gate_bias,
        up_bias,
        gate_threshold=gate_threshold,
        up_threshold=up_threshold,
        gate_mode=gate_mode,
        up_mode=up_mode,
        gate_scale=gate_scale,
        up_scale=up_scale,
        activation=activation,
    )
    return sparse_linear(hidden, down_weight, down_bias, threshold=down_threshold, mode=down_mode, scale=down_scale)
