# SPDX-License-Identifier: Apache-2.0
"""Creates the C++ operations as OpenVINO nodes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import openvino as ov
from openvino.utils.node_factory import NodeFactory

from .build import build_extension, load_library
from .packing import PackedLayer


OPSET = "optimum_scap"


def create_linear(
    x: ov.Output | ov.Node,
    layers: Sequence[PackedLayer],
    *,
    mode: float = 0.0,
    threshold: float = 0.0,
    scale: np.ndarray | None = None,
    decode_only: bool = False,
    precision: str = "split",
    activation_group_size: int = 0,
    library: Path | None = None,
) -> ov.Node:
    """``SCAPLinear``: the layers' results on one thresholded input, one output per layer.

    Args:
        x: float32 ``[..., in_features]``.
        layers: all with the same in_features.
        mode, threshold: keep where ``|x - mode| > threshold``; finite, threshold not negative (0 is dense).
        scale: ``[in_features]``, finite, not negative: keep where ``scale * |x - mode| > threshold``, all in float32.
        decode_only: dense where the last dimension of ``x`` but one (the tokens of a sequence) is not 1.
        precision: ``f32``, ``split`` (relative error below 1e-3) or ``bf16`` (float weights and many rows in bf16).
        activation_group_size: with integer weights, and more rows than a few, activations get one byte, and at most so
            many channels (16 at least) share a scale; 0 is two bytes.
        library: a library of ``build_extension``; default builds (or finds) the native one.

    Raises:
        ExtensionBuildError: the extension cannot be built or loaded.
        RuntimeError: attributes or shapes that do not fit together.
        ValueError: a scale of another shape, not finite or negative.
    """
    scales = {"input": _scale("scale", scale, layers[0].in_features)}
    attributes = _attributes(layers, mode, threshold, decode_only, precision, activation_group_size, scales)
    return _factory(library or build_extension()).create("SCAPLinear", _inputs(x, layers, scales), attributes)


def create_feed_forward(
    x: ov.Output | ov.Node,
    layers: Sequence[PackedLayer],
    activation: str,
    *,
    mode: float = 0.0,
    threshold: float = 0.0,
    scale: np.ndarray | None = None,
    decode_only: bool = False,
    hidden_mode: float = 0.0,
    hidden_threshold: float = 0.0,
    hidden_scale: np.ndarray | None = None,
    precision: str = "split",
    activation_group_size: int = 0,
    library: Path | None = None,
) -> ov.Node:
    """``SCAPFeedForward``: ``down(sparse(activation(gate(sparse(x))) * up(sparse(x))))`` in one node.

    Args:
        layers: gate, up and down; or up and down for an FFN without gate (no product).
        activation: ``silu``, ``gelu_tanh``, ``gelu_erf``, ``relu``, ``relu2`` (relu squared) or ``identity``.
        hidden_mode, hidden_threshold, hidden_scale: those of down's input. Others as for `create_linear`.

    Raises:
        ExtensionBuildError: the extension cannot be built or loaded.
        RuntimeError: attributes or shapes that do not fit together.
        ValueError: a scale of another shape, not finite or negative.
    """
    scales = {
        "input": _scale("scale", scale, layers[0].in_features),
        "hidden": _scale("hidden_scale", hidden_scale, layers[-1].in_features),
    }
    attributes = _attributes(layers, mode, threshold, decode_only, precision, activation_group_size, scales) | {
        "activation": activation,
        "hidden_mode": _number(hidden_mode),
        "hidden_threshold": _number(hidden_threshold),
    }
    return _factory(library or build_extension()).create("SCAPFeedForward", _inputs(x, layers, scales), attributes)


@lru_cache
def _factory(library: Path) -> NodeFactory:
    load_library(library)  # raises what is documented where the factory would raise a RuntimeError
    factory = NodeFactory()
    factory.add_extension(str(library))
    return factory


def _inputs(
    x: ov.Output | ov.Node, layers: Sequence[PackedLayer], scales: dict[str, np.ndarray | None]
) -> list[ov.Output]:
    # Sharing keeps the packed array alive; large numpy arrays lie in huge pages, which the kernels gain 10 % from.
    constants = [ov.op.Constant(layer.buffer, shared_memory=True) for layer in layers]
    constants += [ov.op.Constant(scale) for scale in scales.values() if scale is not None]
    return [x if isinstance(x, ov.Output) else x.output(0), *(c.output(0) for c in constants)]


def _scale(name: str, scale: np.ndarray | None, channels: int) -> np.ndarray | None:
    if scale is None:
        return None
    if np.shape(scale) != (channels,):
        raise ValueError(f"{name} must be [{channels}], got {list(np.shape(scale))}")
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(scale, np.float32)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"{name} must be finite in float32 and not negative")
    return values


def _attributes(
    layers: Sequence[PackedLayer],
    mode: float,
    threshold: float,
    decode_only: bool,
    precision: str,
    activation_group_size: int,
    scales: dict[str, np.ndarray | None],
) -> dict[str, str]:
    """Every attribute as text: see ``SparseOp`` in op.hpp."""
    return {
        "in_features": str(layers[0].in_features),
        "out_features": ", ".join(str(layer.out_features) for layer in layers),
        "weight_types": ", ".join(layer.weight_type for layer in layers),
        "scale_types": ", ".join(layer.scale_type for layer in layers),
        "group_sizes": ", ".join(str(layer.group_size) for layer in layers),
        "zero_points": ", ".join(str(layer.zero_point) for layer in layers),
        "has_bias": ", ".join(str(int(layer.has_bias)) for layer in layers),
        "mode": _number(mode),
        "threshold": _number(threshold),
        "decode_only": "true" if decode_only else "false",
        "scaled": ", ".join(name for name, scale in scales.items() if scale is not None),
        "precision": precision,
        "activation_group_size": str(activation_group_size),
    }


def _number(value: float) -> str:
    """Text that reads as this float32."""
    return repr(float(np.float32(value)))
