"""Replaces threshold operations and the fully connected layers behind them by the C++ sparse operations.

Ours and NNCF's threshold operations are recognised. Layers that share their thresholded input become one `SCAPLinear`;
a whole FFN, `down(act(gate(x)) * up(x))` or `down(act(up(x)))`, becomes one `SCAPFeedForward`. A layer whose weights
the operations cannot read keeps the stock ones. Layers of 4-bit weights that are not pruned may become `SCAPLinear`
too, with a threshold of 0: it reads them faster than OpenVINO's own operation.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from .extension.build import build_extension
from .extension.nodes import OPSET, create_feed_forward, create_linear
from .extension.packing import BufferPool, PackedLayer, is_fast_for_dense_int4
from .graph import FullyConnected, evaluate_constant, evaluate_weights, find_fully_connected, is_constant
from .mapped_files import MappedFiles
from .threshold_ops import ThresholdOps, find_threshold_ops, match_threshold_ops
from .weights import UnsupportedWeightsError, is_int4, pack_weights


logger = logging.getLogger(__name__)


@dataclass
class FusionReport:
    """Module paths of the sparse layers that were fused, of those that were not with the reason, and of dense ones."""

    fused: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _FusedLayer:
    """One layer ready to be replaced: its packed weights with its bias, and the output that it stands for."""

    ops: ThresholdOps
    packed: PackedLayer
    output: ov.Output


def fuse(
    model: ov.Model, *, precision: str = "split", library: Path | None = None, dense_int4: bool | None = None
) -> FusionReport:
    """Fuses every sparse layer of `model` in place.

    Args:
        model: a model with threshold operations; one without is left as it is.
        precision: `f32`, `split` or `bf16`, see `extension.nodes.create_linear`.
        library: the compiled extension; by default it is built or found in the cache.
        dense_int4: whether layers of 4-bit weights that are not pruned use the operation too; by default where that is
            faster: in models that generate token by token, on CPUs with AVX-512 VNNI, unless f32 is asked for. A model
            without threshold operations stays as it is.

    Raises:
        ExtensionBuildError: if the extension cannot be built.
    """
    report = FusionReport()
    ready: dict[str, list[_FusedLayer]] = {}
    found_ops = find_threshold_ops(model)
    if not found_ops:
        return report
    # Finding the library asks the compiler for its version: once for a model, not once for every node.
    library = library or build_extension()
    pool, files = BufferPool(), MappedFiles()
    for ops in found_ops:
        try:
            layer = _prepare(ops, library, pool, files)
        except ValueError as reason:
            report.kept[ops.layer.path] = str(reason)
            logger.debug("%s keeps the stock operations: %s", ops.layer.path, reason)
            continue
        ready.setdefault(ops.select.get_name(), []).append(layer)
    common: dict[str, Any] = {"precision": precision, "library": library}
    groups = list(ready.values())
    # FFNs first: they take two groups each, the one of up (and gate) and the one of down.
    for group in list(groups):
        found = _find_feed_forward(group, groups)
        if found is None:
            continue
        projections, activation = found
        (down,) = group
        _replace_feed_forward(projections, down, activation, common)
        report.fused += [layer.ops.layer.path for layer in (*projections, down)]
        taken = {layer.output.get_node().get_name() for layer in (*projections, down)}
        groups = [other for other in groups if other[0].output.get_node().get_name() not in taken]
    for group in groups:
        ops = group[0].ops
        node = create_linear(
            ops.source,
            [layer.packed for layer in group],
            mode=ops.mode,
            threshold=ops.threshold,
            decode_only=ops.decode_only,
            **common,
        )
        node.set_friendly_name(f"{ops.layer.path}/scap/SCAPLinear")
        for index, layer in enumerate(group):
            _redirect(layer.output, node.output(index))
        report.fused += [layer.ops.layer.path for layer in group]
    if dense_int4 is None:
        dense_int4 = precision != "f32" and _generates(model) and is_fast_for_dense_int4(library)
    if dense_int4:
        report.dense = _fuse_dense_int4(model, pool, files, common)
    model.validate_nodes_and_infer_types()
    return report


def is_operation(node: ov.Node) -> bool:
    """Whether `node` is one of the C++ operations."""
    return node.get_type_info().version_id == OPSET


def set_precision(model: ov.Model, precision: str) -> None:
    """Has the C++ operations that `model` holds compute in another precision, in place.

    Raises:
        RuntimeError: there is no such precision.
    """
    for node in model.get_ops():
        if is_operation(node):
            node.set_attribute("precision", precision)
    model.validate_nodes_and_infer_types()


def _generates(model: ov.Model) -> bool:
    """Whether `model` keeps what it computed for earlier tokens."""
    names = (name for port in model.inputs for name in port.get_names())
    return bool(model.get_sinks()) or any(name.startswith(("past_key_values", "cache_params")) for name in names)


def _fuse_dense_int4(model: ov.Model, pool: BufferPool, files: MappedFiles, common: dict[str, Any]) -> list[str]:
    """Puts the operation in the place of dense layers of 4-bit weights, one for those that share an input."""
    groups: dict[tuple[str, int], list[FullyConnected]] = {}
    for layer in find_fully_connected(model):
        types = {layer.activations.get_element_type(), layer.node.get_output_element_type(0)}
        if types == {ov.Type.f32} and not layer.quantizers and match_threshold_ops(layer) is None and is_int4(layer):
            source = layer.activations
            groups.setdefault((source.get_node().get_name(), source.get_index()), []).append(layer)
    fused = []
    for group in groups.values():
        outputs, packed = [], []
        try:
            for layer in group:
                output, bias = _output_and_bias(layer)
                outputs.append(output)
                packed.append(pack_weights(layer, bias, library=common["library"], pool=pool, files=files))
        except ValueError as reason:
            logger.debug("%s keeps the stock operation: %s", layer.path, reason)
            continue
        node = create_linear(group[0].activations, packed, **common)
        node.set_friendly_name(f"{group[0].path}/SCAPLinear")
        for index, output in enumerate(outputs):
            _redirect(output, node.output(index))
        fused += [layer.path for layer in group]
    return fused


def _prepare(ops: ThresholdOps, library: Path, pool: BufferPool, files: MappedFiles) -> _FusedLayer:
    layer = ops.layer
    if not (np.isfinite(ops.mode) and np.isfinite(ops.threshold) and ops.threshold >= 0):
        raise UnsupportedWeightsError(f"mode {ops.mode} and threshold {ops.threshold}")
    if layer.quantizers:
        raise UnsupportedWeightsError("quantized activations")
    if ops.source.get_element_type() != ov.Type.f32 or layer.node.get_output_element_type(0) != ov.Type.f32:
        raise UnsupportedWeightsError(f"activations of type {ops.source.get_element_type().get_type_name()}")
    # What is pruned becomes the mode, where the operation makes it zero.
    output, bias = _output_and_bias(layer, 0.0 if ops.centred else ops.mode)
    return _FusedLayer(ops, pack_weights(layer, bias, library=library, pool=pool, files=files), output)


def _output_and_bias(layer: FullyConnected, offset: float = 0.0) -> tuple[ov.Output, np.ndarray | None]:
    """The output behind the layer's constant bias, and everything that is added to it: float32 `[out]` or None.

    `offset` is what the layer's activations are more than what the operation multiplies.
    """
    output = layer.node.output(0)
    bias = np.zeros(layer.out_features, dtype=np.float64)
    if offset != 0:
        bias += offset * evaluate_weights(layer).sum(axis=1, dtype=np.float64)
    while True:
        readers = list(output.get_target_inputs())
        if len(readers) != 1 or readers[0].get_node().get_type_name() != "Add":
            break
        add = readers[0].get_node()
        other = add.input_value(1 - readers[0].get_index())
        if not is_constant(other):
            break
        value = evaluate_constant(other)
        if value.size not in (1, layer.out_features) or (value.ndim and value.shape[-1] != value.size):
            break
        bias += value.reshape(-1)
        output = add.output(0)
    return output, bias.astype(np.float32) if bias.any() else None


def _find_feed_forward(
    group: list[_FusedLayer], groups: list[list[_FusedLayer]]
) -> tuple[list[_FusedLayer], str] | None:
    """The layers (gate and up, or up) and the activation in front of `group`, if it is the `down` of an FFN."""
    if len(group) != 1:
        return None
    down = group[0].ops
    hidden = down.source.get_node()
    if any(reader.get_node().get_name() not in down.nodes for reader in hidden.output(0).get_target_inputs()):
        return None
    if hidden.get_type_name() == "Multiply":
        for activated, linear in (hidden.input_values(), reversed(hidden.input_values())):
            activation = _activation(activated.get_node())
            if activation is None or not _read_once(activated) or not _read_once(linear):
                continue
            source = activated.get_node().input_value(0)
            projections = _layers_with_outputs((source, linear), groups, down.decode_only)
            if projections is not None and _read_once(source):
                return projections, activation
    activation = _activation(hidden)
    if activation is not None:
        source = hidden.input_value(0)
        projections = _layers_with_outputs((source,), groups, down.decode_only)
        if projections is not None and _read_once(source):
            return projections, activation
    return None


def _layers_with_outputs(
    outputs: tuple[ov.Output, ...], groups: list[list[_FusedLayer]], decode_only: bool
) -> list[_FusedLayer] | None:
    """The layers that make up one group and have exactly these outputs, in this order."""
    for group in groups:
        if group[0].ops.decode_only != decode_only:
            continue
        by_name = {layer.output.get_node().get_name(): layer for layer in group}
        names = [output.get_node().get_name() for output in outputs]
        if len(group) == len(outputs) == len(set(names)) and all(name in by_name for name in names):
            return [by_name[name] for name in names]
    return None


def _activation(node: ov.Node) -> str | None:
    kind = node.get_type_name()
    if kind == "Swish":
        beta = node.input_values()[1:]
        is_silu = not beta or (is_constant(beta[0]) and evaluate_constant(beta[0]).item() == 1)
        return "silu" if is_silu else None
    if kind == "Gelu":
        return {"ERF": "gelu_erf", "TANH": "gelu_tanh"}.get(str(node.get_attributes()["approximation_mode"]).upper())
    return "relu" if kind == "Relu" else None


def _replace_feed_forward(
    projections: list[_FusedLayer], down: _FusedLayer, activation: str, common: dict[str, Any]
) -> None:
    ops = projections[0].ops
    node = create_feed_forward(
        ops.source,
        [layer.packed for layer in (*projections, down)],
        activation,
        mode=ops.mode,
        threshold=ops.threshold,
        decode_only=ops.decode_only,
        hidden_mode=down.ops.mode,
        hidden_threshold=down.ops.threshold,
        **common,
    )
    node.set_friendly_name(f"{down.ops.layer.path}/scap/SCAPFeedForward")
    _redirect(down.output, node.output(0))


def _read_once(output: ov.Output) -> bool:
    return len(output.get_target_inputs()) == 1


def _redirect(old: ov.Output, new: ov.Output) -> None:
    readers: Iterable[ov.Input] = list(old.get_target_inputs())
    names = old.get_names()
    for reader in readers:
        reader.replace_source_output(new)
    if names:
        new.add_names(names)
