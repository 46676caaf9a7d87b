"""Names for the layers of models whose operations say nothing about them: `MatMul_615`.

openvino_genai makes such models of GGUF files. What a layer does is seen from what lies around it: gate and up are
multiplied, one of them behind an activation, and down reads the product; q, k and v arrive at the three inputs of an
attention, and `o` reads its output; the head ends in the logits.
"""

import re
from collections.abc import Callable, Iterable

import openvino as ov

from .graph import FullyConnected, find_fully_connected


# What OpenVINO calls an operation that was given no name.
_NAMELESS = re.compile(r"MatMul_\d+")
_ACTIVATIONS = ("Swish", "Gelu", "Relu", "Sigmoid", "Tanh", "Mish", "HSwish")
# What may lie between a layer and the operation that its output is for.
_PASSED = ("Convert", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Add")


def name_layers(model: ov.Model) -> int:
    """Gives those layers of `model` that have no name the ones that Llama's have, if no other layer has a role.

    Only friendly names change: `layers.0.mlp.up_proj/MatMul`.

    Returns:
        How many layers were named.
    """
    layers = {layer.node.get_name(): layer for layer in find_fully_connected(model)}
    nameless = {key for key, layer in layers.items() if _NAMELESS.fullmatch(layer.node.get_friendly_name())}
    if not nameless or any(layer.role for layer in layers.values()):
        return 0
    found: dict[str, str] = {}
    ordered = model.get_ordered_ops()
    products = [node for node in ordered if node.get_type_name() == "Multiply"]
    ffns = filter(None, (_ffn(node, layers) for node in products))
    attentions = [_attention(node, layers) for node in ordered if node.get_type_name() == "ScaledDotProductAttention"]
    for block, blocks in (("mlp", ffns), ("self_attn", attentions)):
        for number, members in enumerate(blocks):
            for name, layer in members.items():
                found.setdefault(layer.node.get_name(), f"layers.{number}.{block}.{name}")
    for result in model.get_results():
        for head in _nearest(result.input_values(), layers, _before, _passes):
            found.setdefault(head.node.get_name(), "lm_head")
    named = nameless & found.keys()
    for key in named:
        layers[key].node.set_friendly_name(f"{found[key]}/MatMul")
    return len(named)


def _ffn(product: ov.Node, layers: dict[str, FullyConnected]) -> dict[str, FullyConnected] | None:
    """The layers of a gated FFN by name, if `product` is that of its gate and up."""
    sides = []
    for value in product.input_values():
        node = _skip(value.get_node())
        activated = node.get_type_name() in _ACTIVATIONS
        layer = layers.get((_skip(node.input_value(0).get_node()) if activated else node).get_name())
        sides.append((activated, layer))
    sides.sort(key=lambda side: side[0])
    (up_activated, up), (gate_activated, gate) = sides
    downs = _nearest(product.outputs(), layers, _after, _passes)
    if up is None or gate is None or up_activated or not gate_activated or len(downs) != 1:
        return None
    return {"gate_proj": gate, "up_proj": up, "down_proj": downs[0]} if up.input_key == gate.input_key else None


def _attention(node: ov.Node, layers: dict[str, FullyConnected]) -> dict[str, FullyConnected]:
    """The layers around an attention by name."""
    found = {}
    for name, value in zip(("q_proj", "k_proj", "v_proj"), node.input_values(), strict=False):
        nearest = _nearest([value], layers, _before, lambda _: True)
        if len(nearest) == 1:
            found[name] = nearest[0]
    outputs = _nearest(node.outputs(), layers, _after, _passes)
    if len(outputs) == 1:
        found["o_proj"] = outputs[0]
    return found


def _passes(node: ov.Node) -> bool:
    return node.get_type_name() in _PASSED


def _skip(node: ov.Node) -> ov.Node:
    while _passes(node) and node.get_type_name() != "Add":
        node = node.input_value(0).get_node()
    return node


def _before(value: ov.Output) -> Iterable[tuple[ov.Node, list[ov.Output]]]:
    node = value.get_node()
    return [(node, node.input_values())]


def _after(value: ov.Output) -> Iterable[tuple[ov.Node, list[ov.Output]]]:
    return [(entry.get_node(), entry.get_node().outputs()) for entry in value.get_target_inputs()]


def _nearest(
    start: Iterable[ov.Output],
    layers: dict[str, FullyConnected],
    step: Callable[[ov.Output], Iterable[tuple[ov.Node, list[ov.Output]]]],
    passes: Callable[[ov.Node], bool],
) -> list[FullyConnected]:
    """The first layers met on every way from `start`, through operations that `passes` lets through."""
    pending, seen, found = list(start), set(), []
    while pending:
        for node, following in step(pending.pop()):
            key = node.get_name()
            if key in seen:
                continue
            seen.add(key)
            if key in layers:
                found.append(layers[key])
            elif passes(node):
                pending += following
    return found
