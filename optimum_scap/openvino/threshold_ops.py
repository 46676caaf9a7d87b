"""The threshold operations of SCAP in an `ov.Model`: insert them, recognize them.

In front of a fully connected layer `y = W x + b` stands

    mode == 0:  Abs(x) -> LessEqual(t) -> Select(0, x)                                   -> MatMul
    mode != 0:  d = Subtract(x, m);  Abs(d) -> LessEqual(t) -> Select(0, d)              -> MatMul -> Add(b + m * W.1)
    quantized activations, mode != 0:  as above, but Select(m, x) -> FakeQuantize        -> MatMul
    scale per channel:  as above, with Abs -> Multiply(s) -> LessEqual(t)
    decode only:  as above, with another threshold, see `decode_only`

which is the criterion (see `core.criterion`) in float32; a NaN is kept. Without the mode this is the pattern that
NNCF's torch backend exports. Where the activations are quantized too, the quantizer was calibrated on x, not on x - m:
what is pruned becomes m itself there, and nothing is folded. A threshold of 0 prunes nothing that would count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as opset
from openvino.utils.node_factory import NodeFactory

from ..core.criterion import Criterion
from .decode_only import match_threshold_in_decode, same_output, threshold_in_decode
from .graph import FullyConnected, evaluate_constant, evaluate_weights, find_fully_connected, is_constant


_CORRECTION = "bias_correction"


@dataclass(frozen=True)
class ThresholdOps:
    """The threshold operations in front of one fully connected layer."""

    layer: FullyConnected
    select: ov.Node
    mask: ov.Output  # boolean, true where the channel is pruned
    source: ov.Output  # the activations before pruning
    criterion: Criterion
    decode_only: bool  # whether only forwards of one token per sequence are pruned
    centered: bool  # whether the layer reads x - mode (the mode is in its bias) rather than x
    nodes: frozenset[str]  # names of the operations that read `source`


def insert_threshold_ops(layers: Sequence[FullyConnected], criterion: Criterion, *, decode_only: bool = False) -> None:
    """Prunes the shared input of `layers` in place, folding the mode into each layer's bias.

    Args:
        layers: fully connected layers that read the same activations through the same quantizers.
        criterion: what is pruned.
        decode_only: prune only where the activations `[..., tokens, channels]` hold one token per sequence.
    """
    mode = np.float32(criterion.mode)
    source = _source_in_float32(layers[0])
    threshold = _constant(np.float32(criterion.threshold), "threshold", layers[0])
    rank = source.get_partial_shape().rank.get_length()
    if decode_only and rank > 1:
        threshold = threshold_in_decode(source, threshold, is_scaled=criterion.scale is not None)
    mode_constant = _constant(mode, "mode", layers[0])
    scale = None if criterion.scale is None else _constant(criterion.scale, "scale", layers[0])
    if mode != 0 and layers[0].quantizers:
        select = _select_mode(source, mode_constant, threshold, scale)
    else:
        centered = source if mode == 0 else opset.subtract(source, mode_constant).output(0)
        mask = opset.less_equal(_score(centered, scale), threshold)
        select = opset.select(mask, opset.constant(np.float32(0.0)), centered)
        if mode != 0:
            for layer in layers:
                _add_to_bias(layer, mode * evaluate_weights(layer).sum(axis=1, dtype=np.float64))
    select.set_friendly_name(f"{layers[0].path}/scap/Select")
    _replace_input(layers, select.output(0))


def insert_adjustable_ops(
    layers: Sequence[FullyConnected], mode: ov.Node, threshold: ov.Node, scale: "np.ndarray | None" = None
) -> None:
    """Prunes the shared input of `layers` in place with a float32 scalar mode and threshold that are model inputs.

    What is pruned becomes the mode itself, which gives the same outputs as folding it, for any mode.
    """
    factor = None if scale is None else opset.constant(scale)
    select = _select_mode(_source_in_float32(layers[0]), mode, threshold, factor)
    _replace_input(layers, select.output(0))


def add_bias_correction(layer: FullyConnected, correction: np.ndarray) -> None:
    """Adds `correction` `[out_features]` to the output of `layer`, as a constant of its own that can be read again.

    OpenVINO folds it into the bias when it compiles the model.
    """
    output = layer.node.output(0)
    rank = output.get_partial_shape().rank.get_length()
    value = _constant_like(correction.astype(np.float32).reshape((1,) * (rank - 1) + (-1,)), layer, _CORRECTION)
    found = _constant_bias(layer)
    if found is not None:
        add, port, _ = found
        add.input(port).replace_source_output(opset.add(add.input_value(port), value).output(0))
        return
    readers = list(output.get_target_inputs())
    added = opset.add(output, value)
    added.set_friendly_name(f"{layer.path}/scap/Add")
    for reader in readers:
        reader.replace_source_output(added.output(0))


def read_tensors(model: ov.Model) -> dict[str, np.ndarray]:
    """The vectors per channel that a sparse `model` holds, by `PATH.scap_NAME`, see SCAPParameters.named_tensors."""
    found = {
        f"{match.layer.path}.scap_scale": match.criterion.scale
        for match in find_threshold_ops(model)
        if match.criterion.scale is not None
    }
    ending = f"/scap/{_CORRECTION}"
    for node in model.get_ops():
        name = node.get_friendly_name()
        if node.get_type_name() == "Constant" and name.endswith(ending):
            path = name.removesuffix(ending)
            found[f"{path}.scap_bias_correction"] = np.array(node.data, dtype=np.float32).reshape(-1)
    return found


def _select_mode(source: ov.Output, mode: ov.Node, threshold: ov.Node, scale: ov.Node | None) -> ov.Node:
    mask = opset.less_equal(_score(opset.subtract(source, mode).output(0), scale), threshold)
    return opset.select(mask, mode, source)


def _score(centered: ov.Output, scale: ov.Node | None) -> ov.Node:
    magnitude = opset.abs(centered)
    return magnitude if scale is None else opset.multiply(magnitude, scale)


def _source_in_float32(layer: FullyConnected) -> ov.Output:
    source = layer.activations
    return source if source.get_element_type() == ov.Type.f32 else opset.convert(source, "f32").output(0)


def _replace_input(layers: Sequence[FullyConnected], value: ov.Output) -> None:
    element_type = layers[0].activations.get_element_type()
    if element_type != ov.Type.f32:
        value = opset.convert(value, element_type.get_type_name()).output(0)
    for quantizer in reversed(layers[0].quantizers):
        value = _clone(quantizer, value)
    for layer in layers:
        layer.node.input(0).replace_source_output(value)


def find_threshold_ops(model: ov.Model) -> list[ThresholdOps]:
    """The threshold operations of every fully connected layer of `model` that has them, ours or NNCF's."""
    found = []
    for layer in find_fully_connected(model):
        match = match_threshold_ops(layer)
        if match is not None:
            found.append(match)
    return found


def match_threshold_ops(layer: FullyConnected) -> ThresholdOps | None:
    """The threshold operations in front of `layer`, or None if its input is not pruned."""
    select = _skip_convert(layer.activations).get_node()
    if select.get_type_name() != "Select":
        return None
    mask, fill, kept = select.input_values()
    less_equal = mask.get_node()
    if less_equal.get_type_name() != "LessEqual":
        return None
    magnitude, scale = _magnitude_and_scale(less_equal.input_value(0), layer.in_features)
    if magnitude.get_type_name() != "Abs" or not is_constant(fill):
        return None
    threshold_output, shape_of = less_equal.input_value(1), None
    if not is_constant(threshold_output):
        in_decode = match_threshold_in_decode(threshold_output, magnitude.input_value(0))
        if in_decode is None:
            return None
        threshold_output, shape_of = in_decode
    threshold, fill_value = (evaluate_constant(value) for value in (threshold_output, fill))
    if threshold.size != 1 or fill_value.size != 1:
        return None
    centered = magnitude.input_value(0)
    subtract = centered.get_node()
    mode, source = np.float32(0.0), centered
    # OpenVINO's conversion of a traced model writes x - m as x + (-m).
    sign = {"Subtract": 1, "Add": -1}.get(subtract.get_type_name())
    if sign is not None and is_constant(subtract.input_value(1)):
        mode_value = evaluate_constant(subtract.input_value(1))
        if mode_value.size == 1:
            mode, source = sign * mode_value.reshape(()), subtract.input_value(0)
    reads_centered = same_output(kept, centered) and fill_value.item() == 0
    reads_source = same_output(kept, source) and fill_value.item() == mode
    if not reads_centered and not reads_source:
        return None
    readers = (select, magnitude, subtract) if shape_of is None else (select, magnitude, subtract, shape_of)
    nodes = frozenset(node.get_name() for node in readers)
    return ThresholdOps(
        layer=layer,
        select=select,
        mask=mask,
        source=source,
        criterion=Criterion(np.float32(mode), np.float32(threshold.item()), scale),
        decode_only=shape_of is not None,
        centered=reads_centered,
        nodes=nodes,
    )


def _magnitude_and_scale(score: ov.Output, in_features: int) -> tuple[ov.Node, np.ndarray | None]:
    """|x - m|, and the scale per channel that it is multiplied by, if any."""
    node = _skip_convert(score).get_node()
    if node.get_type_name() != "Multiply":
        return node, None
    for magnitude, factor in (node.input_values(), reversed(node.input_values())):
        if is_constant(factor) and not is_constant(magnitude):
            value = evaluate_constant(factor)
            if value.size in (1, in_features) and value.shape[-1:] in ((), (value.size,)):
                return _skip_convert(magnitude).get_node(), np.broadcast_to(value.reshape(-1), in_features).copy()
    return node, None


def _skip_convert(value: ov.Output) -> ov.Output:
    while value.get_node().get_type_name() == "Convert":
        value = value.get_node().input_value(0)
    return value


def _constant(value: Any, name: str, layer: FullyConnected) -> ov.Node:
    node = opset.constant(value)
    node.set_friendly_name(f"{layer.path}/scap/{name}")
    return node


def _clone(quantizer: ov.Node, value: ov.Output) -> ov.Output:
    inputs = [value, *quantizer.input_values()[1:]]
    node = NodeFactory("opset13").create(quantizer.get_type_name(), inputs, quantizer.get_attributes())
    node.set_friendly_name(f"{quantizer.get_friendly_name()}/scap")
    return node.output(0)


def _add_to_bias(layer: FullyConnected, addend: np.ndarray) -> None:
    """Adds `addend` `[out_features]` to the output of `layer`: to its constant bias if it has one, else as an Add."""
    output = layer.node.output(0)
    readers = list(output.get_target_inputs())
    found = _constant_bias(layer)
    if found is not None:
        add, port, bias = found
        folded = (bias + addend.reshape((1,) * (bias.ndim - 1) + (-1,))).astype(np.float32)
        add.input(port).replace_source_output(_constant_like(folded, layer).output(0))
        return
    rank = output.get_partial_shape().rank.get_length()
    bias_constant = _constant_like(addend.astype(np.float32).reshape((1,) * (rank - 1) + (-1,)), layer)
    added = opset.add(output, bias_constant)
    added.set_friendly_name(f"{layer.path}/scap/Add")
    for reader in readers:
        reader.replace_source_output(added.output(0))


def _constant_bias(layer: FullyConnected) -> tuple[ov.Node, int, np.ndarray] | None:
    """The Add behind `layer` that adds a constant bias, the port of the bias, and its value in float64."""
    readers = list(layer.node.output(0).get_target_inputs())
    if len(readers) != 1 or readers[0].get_node().get_type_name() != "Add":
        return None
    add = readers[0].get_node()
    port = 1 - readers[0].get_index()
    if not is_constant(add.input_value(port)):
        return None
    bias = evaluate_constant(add.input_value(port)).astype(np.float64)
    fits = bias.ndim and bias.shape[-1] in (1, layer.out_features) and bias.size == bias.shape[-1]
    return (add, port, bias) if fits else None


def _constant_like(value: np.ndarray, layer: FullyConnected, name: str = "bias") -> ov.Node:
    element_type = layer.node.get_output_element_type(0)
    constant = opset.constant(value)
    constant.set_friendly_name(f"{layer.path}/scap/{name}")
    if element_type == ov.Type.f32:
        return constant
    return opset.convert(constant, element_type.get_type_name())
