"""The layers over one input that one launch computes, its branches, and the checks that kernels rely on."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..weights import KernelArguments, find_format
from .reference import check_scale


MAX_ROWS = 8
MAX_BRANCHES = 3


class Branch(NamedTuple):
    """One layer over the shared input; a threshold below zero keeps all channels."""

    weights: KernelArguments
    out_features: int
    threshold: float = -1.0
    mode: float = 0.0
    scale: Tensor | None = None


def rows_of(x: Tensor) -> Tensor:
    """The input of the sparse kernels, `[rows, in_features]`.

    Raises:
        ValueError: there are too many rows.
    """
    rows = x.numel() // max(1, x.shape[-1])
    if rows > MAX_ROWS:
        raise ValueError(f"sparse kernels take up to {MAX_ROWS} rows, got {rows}")
    return x.reshape(-1, x.shape[-1]).contiguous()


def row_of(x: Tensor) -> Tensor:
    """The input of the dense kernel, `[1, in_features]`.

    Raises:
        ValueError: there is more than one row.
    """
    if x.numel() != x.shape[-1]:
        raise ValueError(f"the dense kernel takes one row, got an input of shape {tuple(x.shape)}")
    return x.reshape(1, -1).contiguous()


def _checked(
    x: Tensor, weights: Sequence[Tensor], format: str, input_major: bool
) -> list[tuple[KernelArguments, int]]:
    """What a kernel is given for each layer, and the layer's out_features."""
    weight_format = find_format(format)
    layers: list[tuple[KernelArguments, int]] = []
    for tensors in weight_format.layers(weights):
        out_features, in_features = weight_format.shape(tensors)
        if in_features != x.shape[-1]:
            raise ValueError(f"weight of {in_features} input channels, input of {x.shape[-1]}")
        arguments = weight_format.kernel_arguments(tensors, input_major)
        for tensor in arguments.tensors:
            if tensor.device != x.device:
                raise ValueError(f"weight on {tensor.device}, input on {x.device}")
        if layers and arguments.kind != layers[0][0].kind:
            raise ValueError(
                f"layers over one input must be stored alike, in types, groups and zero points; got {format} weights "
                "that are not"
            )
        layers.append((arguments, out_features))
    return layers


def dense_branches(x: Tensor, weights: Sequence[Tensor], format: str) -> list[Branch]:
    """The layers whose weights `weights` holds in turn; ValueError if the dense kernel cannot run them."""
    return [Branch(*layer) for layer in _checked(x, weights, format, input_major=False)]


def sparse_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    format: str,
    thresholds: Sequence[float],
    modes: Sequence[float],
    scales: Sequence[Tensor | None],
) -> list[Branch]:
    """The layers whose weights `weights` holds in turn; ValueError if the sparse kernels cannot run them."""
    layers = _checked(x, weights, format, input_major=True)
    for scale in scales:
        check_scale(x, scale)
    return [
        Branch(*layer, threshold, mode, scale)
        for layer, threshold, mode, scale in zip(layers, thresholds, modes, scales, strict=True)
    ]


def outputs(x: Tensor, branches: Sequence[Branch]) -> list[Tensor]:
    """Memory for the outputs, `[rows, out_features]` each."""
    return [x.new_empty((x.shape[0], branch.out_features)) for branch in branches]


def launches(branches: Sequence[Branch]) -> list[slice]:
    """The branches that run together."""
    return [slice(first, first + MAX_BRANCHES) for first in range(0, len(branches), MAX_BRANCHES)]
