"""Fully connected layers of an `ov.Model`: where they are, what they read, what their weights are."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import openvino as ov
from openvino import opset13 as opset

from ..core.roles import Role, find_role, module_path


# Operations that NNCF puts between the activations and a MatMul when it quantizes activations too.
_ACTIVATION_QUANTIZERS = ("FakeQuantize", "FakeConvert")


@dataclass(frozen=True)
class FullyConnected:
    """A MatMul of activations `[..., in_features]` with constant weights `[out_features, in_features]`.

    `weights_transposed` is true when the constant is stored `[in_features, out_features]` (GPT-2).
    """

    node: ov.Node
    path: str
    role: Role | None
    in_features: int
    out_features: int
    weights_transposed: bool

    @property
    def quantizers(self) -> tuple[ov.Node, ...]:
        """The activation quantizers in front of the MatMul, the one nearest to it first."""
        found = []
        node = self.node.input_value(0).get_node()
        while node.get_type_name() in _ACTIVATION_QUANTIZERS:
            found.append(node)
            node = node.input_value(0).get_node()
        return tuple(found)

    @property
    def input_key(self) -> tuple[str, int]:
        """Equal for layers that read the very same tensor."""
        source = self.node.input_value(0)
        return source.get_node().get_name(), source.get_index()

    @property
    def activations(self) -> ov.Output:
        """What is compared with the threshold: the MatMul's input, before it is quantized."""
        quantizers = self.quantizers
        return (quantizers[-1] if quantizers else self.node).input_value(0)

    @property
    def weights(self) -> ov.Output:
        """The weights as the MatMul reads them, behind whatever decompresses them."""
        return self.node.input_value(1)


def find_fully_connected(model: ov.Model) -> list[FullyConnected]:
    """All fully connected layers of `model` in execution order."""
    layers = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        attributes = node.get_attributes()
        weights, activations = node.input_value(1), node.input_value(0)
        shape = weights.get_partial_shape()
        rank = activations.get_partial_shape().rank
        if attributes["transpose_a"] or shape.rank.is_dynamic or len(shape) != 2 or shape.is_dynamic:
            continue
        if rank.is_dynamic or rank.get_length() < 1 or is_constant(activations) or not is_constant(weights):
            continue
        rows, columns = shape.to_shape()
        transposed = not attributes["transpose_b"]
        name = node.get_friendly_name()
        layers.append(
            FullyConnected(
                node=node,
                path=module_path(name),
                role=find_role(name),
                in_features=rows if transposed else columns,
                out_features=columns if transposed else rows,
                weights_transposed=transposed,
            )
        )
    return layers


def named_layers(model: ov.Model) -> dict[str, FullyConnected]:
    """The fully connected layers of `model` by module path; where several share a path, only the first one has it.

    The others (the low-rank branches of NNCF's LoRA correction, a layer that is called twice) stay dense.
    """
    named: dict[str, FullyConnected] = {}
    for layer in find_fully_connected(model):
        named.setdefault(layer.path, layer)
    return named


def group_by_input(layers: Iterable[FullyConnected]) -> list[list[FullyConnected]]:
    """The layers that read the very same tensor, together."""
    groups: dict[tuple[str, int], list[FullyConnected]] = {}
    for layer in layers:
        groups.setdefault(layer.input_key, []).append(layer)
    return list(groups.values())


def is_constant(output: ov.Output) -> bool:
    """Whether `output` depends on constants only (weights, possibly compressed)."""
    pending = [output.get_node()]
    seen: set[str] = set()
    while pending:
        node = pending.pop()
        inputs = node.input_values()
        if not inputs and node.get_type_name() != "Constant":
            return False
        for value in inputs:
            parent = value.get_node()
            if parent.get_name() not in seen:
                seen.add(parent.get_name())
                pending.append(parent)
    return True


def evaluate_constant(output: ov.Output) -> np.ndarray:
    """The value of a constant subgraph in float32, computed by OpenVINO itself: exactly the weights that will run."""
    node = output.get_node()
    while node.get_type_name() == "Convert" and node.get_output_element_type(0) == ov.Type.f32:
        node = node.input_value(0).get_node()
    if node.get_type_name() == "Constant" and node.get_output_element_type(0) in (ov.Type.f32, ov.Type.f16):
        return np.array(node.data, dtype=np.float32)
    model = ov.Model([opset.result(output)], [], "constant")
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled({})[0], dtype=np.float32)


def evaluate_weights(layer: FullyConnected) -> np.ndarray:
    """The dequantized weights of `layer`, float32 `[out_features, in_features]`."""
    weights = evaluate_constant(layer.weights)
    return weights.T if layer.weights_transposed else weights
