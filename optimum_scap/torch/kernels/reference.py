"""The plain torch twins of the kernels: what they compute, what runs on the CPU, and what the tests compare with.

    keep_i = s_i |x_i - m| > t              in float32, strictly greater; NaN is kept; s_i = 1 where there is no scale
    y      = sum over kept i of (x_i - m) W[:, i]  +  bias

(SCAP, arXiv 2412.07174, section 3; `bias` holds the folded mode, b + m * W·1.)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..criterion import prune
from ..weights import find_format
from ..weights.packed import PackedFormat


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def check_scale(x: Tensor, scale: Tensor | None) -> None:
    """Raises ValueError if `scale` is no scale of the input channels of `x`."""
    if scale is None:
        return
    wanted, got = (x.shape[-1],), tuple(scale.shape)
    if got != wanted or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(
            f"a scale must be contiguous float32 of shape {wanted}; got {scale.dtype} of shape {got} and strides "
            f"{scale.stride()}"
        )
    if scale.device != x.device:
        raise ValueError(f"scale on {scale.device}, input on {x.device}")


def prune_input(x: Tensor, threshold: float, mode: float, scale: Tensor | None) -> Tensor:
    """`x` `[..., in_features]` with the mode, rounded to its type, in place of every element that is pruned."""
    check_scale(x, scale)
    return prune(x.contiguous(), mode, threshold, scale)


def _sparse_linear_float32(
    x: Tensor,
    weights: Sequence[Tensor],
    format: str,
    bias: Tensor | None,
    threshold: float,
    mode: float,
    scale: Tensor | None,
) -> Tensor:
    check_scale(x, scale)
    weight_format = find_format(format)
    centered = x.float() - mode
    distance = centered.abs() if scale is None else centered.abs() * scale
    kept = torch.where(distance <= threshold, 0.0, centered)
    if mode == 0.0:  # what is kept is x itself: the product needs no copy of the weights in float32
        y = weight_format.multiply(kept.to(x.dtype), weights).float()
    else:
        y = F.linear(kept, weight_format.dequantize(weights, torch.float32))
    return y if bias is None else y + bias.float()


def sparse_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    format: str,
    bias: Tensor | None,
    threshold: float,
    mode: float,
    scale: Tensor | None,
) -> Tensor:
    """A linear layer that reads only the weights of the kept input channels.

    Args:
        x: `[..., in_features]`, up to 8 rows.
        weights: the tensors of `[out_features, in_features]` weights; dense ones are one tensor, input-channel-major
            in memory: strides (1, >= out_features).
        format: name of a `torch.weights` format.
        bias: `[out_features]`, with the folded mode in it.
        threshold: t of the formula, a float32 value. Below zero every channel is kept.
        mode: m of the formula, a float32 value.
        scale: s of the formula, `[in_features]`, float32, contiguous, on the device of `x`; None for ones.

    Returns:
        `[..., out_features]` of the type of `x`, accumulated in float32.
    """
    return _sparse_linear_float32(x, weights, format, bias, threshold, mode, scale).to(x.dtype)


def sparse_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    format: str,
    biases: Sequence[Tensor | None],
    thresholds: Sequence[float],
    modes: Sequence[float],
    scales: Sequence[Tensor | None],
) -> list[Tensor]:
    """Several sparse linear layers over one input (`q`, `k`, `v`), each with its own threshold, mode and scale.

    `weights` holds the tensors of the first layer, then those of the second, and so on.
    """
    layers = zip(find_format(format).layers(weights), biases, thresholds, modes, scales, strict=True)
    return [sparse_linear(x, layer[0], format, *layer[1:]) for layer in layers]


def linear_group(x: Tensor, weights: Sequence[Tensor], format: str, biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Several dense linear layers over one token.

    Args:
        x: `[..., in_features]`, one row.
        weights: the tensors of each layer in turn; dense weights are output-channel-major in memory, as nn.Linear has
            them.
        format: name of a `torch.weights` format.
        biases: `[out_features]` or None each.
    """
    weight_format = find_format(format)
    layers = zip(weight_format.layers(weights), biases, strict=True)
    return [weight_format.multiply(x, tensors, bias) for tensors, bias in layers]


def sparse_gated_linear(
    x: Tensor,
    gate_weights: Sequence[Tensor],
    up_weights: Sequence[Tensor],
    format: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    gate_threshold: float,
    up_threshold: float,
    gate_mode: float,
    up_mode: float,
    gate_scale: Tensor | None,
    up_scale: Tensor | None,
    activation: str,
) -> Tensor:
    """activation(gate(x)) * up(x), rounded once; `activation` is one of ACTIVATIONS."""
    gate = _sparse_linear_float32(x, gate_weights, format, gate_bias, gate_threshold, gate_mode, gate_scale)
    up = _sparse_linear_float32(x, up_weights, format, up_bias, up_threshold, up_mode, up_scale)
    return (ACTIVATIONS[activation](gate) * up).to(x.dtype)


def integer_linear(x: Tensor, weights: Sequence[Tensor], format: str, bias: Tensor | None) -> Tensor:
    """A dense linear layer of many rows over `int4` or `int8` weights; see `WeightFormat.multiply`."""
    weight_format = find_format(format)
    assert isinstance(weight_format, PackedFormat)
    return weight_format.multiply_by_blocks(x, weights, bias)


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
) -> Tensor:
    """A mixture of experts, each down(activation(gate(x)) * up(x)), all layers sparse.

    Args:
        x: `[rows, hidden]`, up to 8 rows.
        chosen: `[rows, k]`, the experts of each row; a number that no expert has adds nothing.
        routing: `[rows, k]`, what their outputs are multiplied by.
        gate_up: `[experts, 2 * intermediate, hidden]`, the rows of gate before those of up; on a GPU
            input-channel-major in memory: strides (any, 1, >= 2 * intermediate).
        down: `[experts, hidden, intermediate]`, likewise.
        gate_up_bias, down_bias: `[experts, outputs]`, with the folded modes in them, or None.
        thresholds, modes: t and m of the formula, `[3, experts]`, float32: of gate, up and down.
        activation: one of ACTIVATIONS.

    Returns:
        `[rows, hidden]` of the type of `x`; what enters `down` is rounded to it, sums are not.
    """
    half = gate_up.shape[1] // 2
    criteria = list(zip(thresholds.t().tolist(), modes.t().tolist(), strict=True))
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for row, experts in enumerate(chosen.tolist()):
        for place, expert in enumerate(experts):
            if not 0 <= expert < len(criteria):
                continue
            (gate_t, up_t, down_t), (gate_m, up_m, down_m) = criteria[expert]
            gate_b, up_b = (None, None) if gate_up_bias is None else gate_up_bias[expert].split(half)
            down_b = None if down_bias is None else down_bias[expert]
            gate_weight, up_weight = gate_up[expert].split(half)
            gate = _sparse_linear_float32(x[row], [gate_weight], "dense", gate_b, gate_t, gate_m, None)
            up = _sparse_linear_float32(x[row], [up_weight], "dense", up_b, up_t, up_m, None)
            hidden = (ACTIVATIONS[activation](gate) * up).to(x.dtype)
            value = _sparse_linear_float32(hidden, [down[expert]], "dense", down_b, down_t, down_m, None)
            out[row] += routing[row, place].float() * value
    return out.to(x.dtype)
