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
    decode_only: bool = False,
    precision: str = "split",
    library: Path | None = None,
) -> ov.Node:
    """``SCAPLinear``: the layers' results on one thresholded input, one output per layer.

    Args:
        x: float32 ``[..., in_features]``.
        layers: all with the same in_features.
        mode, threshold: keep where ``|x - mode| > threshold``; finite, threshold not negative (0 is dense).
        decode_only: dense where the last dimension of ``x`` but one (the tokens of a sequence) is not 1.
        precision: ``f32``, ``split`` (relative error below 1e-3) or ``bf16`` (float weights and many rows in bf16).
        library: a library of ``build_extension``; default builds (or finds) the native one.

    Raises:
        ExtensionBuildError: the extension cannot be built or loaded.
        RuntimeError: attributes or shapes that do not fit together.
    """
    attributes = _attributes(layers, mode, threshold, decode_only, precision)
    return _factory(library or build_extension()).create("SCAPLinear", _inputs(x, layers), attributes)


def create_feed_forward(
    x: ov.Output | ov.Node,
    layers: Sequence[PackedLayer],
    activation: str,
    *,
    mode: float = 0.0,
    threshold: float = 0.0,
    decode_only: bool = False,
    hidden_mode: float = 0.0,
    hidden_threshold: float = 0.0,
    precision: str = "split",
    library: Path | None = None,
) -> ov.Node:
    """``SCAPFeedForward``: ``down(sparse(activation(gate(sparse(x))) * up(sparse(x))))`` in one node.

    Args:
        layers: gate, up and down; or up and down for an FFN without gate (no product).
        activation: ``silu``, ``gelu_tanh``, ``gelu_erf``, ``relu``, ``relu2`` (relu squared) or ``identity``.
        hidden_mode, hidden_threshold: those of down's input. Others as for `create_linear`.

    Raises:
        ExtensionBuildError: the extension cannot be built or loaded.
        RuntimeError: attributes or shapes that do not fit together.
    """
    attributes = _attributes(layers, mode, threshold, decode_only, precision) | {
        "activation": activation,
        "hidden_mode": _number(hidden_mode),
        "hidden_threshold": _number(hidden_threshold),
    }
    return _factory(library or build_extension()).create("SCAPFeedForward", _inputs(x, layers), attributes)


@lru_cache
def _factory(library: Path) -> NodeFactory:
    load_library(library)  # raises what is documented where the factory would raise a RuntimeError
    factory = NodeFactory()
    factory.add_extension(str(library))
    return factory


def _inputs(x: ov.Output | ov.Node, layers: Sequence[PackedLayer]) -> list[ov.Output]:
    # Sharing keeps the packed array alive; large numpy arrays lie in huge pages, which the kernels gain 10 % from.
    constants = [ov.op.Constant(layer.buffer, shared_memory=True) for layer in layers]
    return [x if isinstance(x, ov.Output) else x.output(0), *(c.output(0) for c in constants)]


def _attributes(
    layers: Sequence[PackedLayer], mode: float, threshold: float, decode_only: bool, precision: str
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
        "precision": precision,
    }


def _number(value: float) -> str:
    """Text that reads as this float32."""
    return repr(float(np.float32(value)))
