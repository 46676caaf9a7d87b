"""Layers whose operations have no names: what they do is seen from what lies around them."""

import itertools

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as opset
from synthetic import gated_ffn

from optimum_scap import SCAPError, sparsify_activations
from optimum_scap.openvino.graph import find_fully_connected
from optimum_scap.openvino.names import name_layers


HEADS, SIZE = 2, 8
HIDDEN, VOCABULARY = HEADS * SIZE, 40


def paths(model: ov.Model) -> list[str]:
    return [layer.path for layer in find_fully_connected(model)]


def forget_names(model: ov.Model) -> ov.Model:
    numbers = itertools.count(100)
    for layer in find_fully_connected(model):
        layer.node.set_friendly_name(f"MatMul_{next(numbers)}")
    return model


def decoder(blocks: int = 2) -> ov.Model:
    """Blocks of attention and a gated FFN, and a head, as openvino_genai writes them; input `x` [1, tokens, 16]."""
    rng = np.random.default_rng(0)
    numbers = itertools.count()

    def layer(x: ov.Node, outputs: int) -> ov.Node:
        inputs = x.get_output_partial_shape(0)[2].get_length()
        weights = opset.convert(opset.constant(rng.standard_normal((outputs, inputs)).astype(np.float16)), "f32")
        node = opset.matmul(x, weights, False, True)
        node.set_friendly_name(f"MatMul_{next(numbers)}")
        return node

    def heads(x: ov.Node) -> ov.Node:
        return opset.transpose(
            opset.reshape(x, opset.constant([0, 0, HEADS, SIZE]), True), opset.constant([0, 2, 1, 3])
        )

    x = opset.parameter([1, -1, HIDDEN], np.float32, name="x")
    x.output(0).set_names({"x"})
    value: ov.Node = x
    angle = opset.constant(np.float32(0.5))
    for _ in range(blocks):
        v, q, k = (layer(value, HIDDEN) for _ in range(3))  # in another order than they are used in
        rotated = [opset.multiply(heads(each), opset.cos(angle)) for each in (q, k)]
        mixed = opset.scaled_dot_product_attention(*rotated, heads(v), causal=True)
        joined = opset.reshape(
            opset.transpose(mixed, opset.constant([0, 2, 1, 3])), opset.constant([0, 0, HIDDEN]), True
        )
        value = opset.add(value, layer(joined, HIDDEN))
        up = layer(value, 3 * HIDDEN)  # before gate
        product = opset.multiply(up, opset.swish(layer(value, 3 * HIDDEN)))
        value = opset.add(value, layer(product, HIDDEN))
    return ov.Model([opset.result(layer(value, VOCABULARY))], [x], "decoder")


def test_every_layer_of_a_decoder() -> None:
    model = decoder()
    assert name_layers(model) == 15
    expected = []
    for block in range(2):
        expected += [f"layers.{block}.self_attn.{name}_proj" for name in ("q", "k", "v", "o")]
        expected += [f"layers.{block}.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert sorted(paths(model)) == sorted([*expected, "lm_head"])
    by_path = {layer.path: layer.node for layer in find_fully_connected(model)}
    attention = next(node for node in model.get_ordered_ops() if node.get_type_name() == "ScaledDotProductAttention")
    q = attention.input_value(0).get_node().input_value(0).get_node().input_value(0).get_node().input_value(0)
    assert q.get_node() == by_path["layers.0.self_attn.q_proj"]
    swish = next(node for node in model.get_ordered_ops() if node.get_type_name() == "Swish")
    assert swish.input_value(0).get_node() == by_path["layers.0.mlp.gate_proj"]
    assert name_layers(model) == 0  # they have names now


def test_a_model_without_names_is_pruned_like_the_same_with_names() -> None:
    rng = np.random.default_rng(0)
    hidden = gated_ffn().inputs[0].partial_shape[2].get_length()
    data = [{"x": rng.standard_normal((1, 32, hidden), np.float32)} for _ in range(4)]
    spec = "up=0.4,gate=0.4,down=0.6"
    outputs = []
    for model in (gated_ffn(), forget_names(gated_ffn())):
        sparse = sparsify_activations(model, spec, data)
        outputs.append(ov.Core().compile_model(sparse, "CPU")(data[0])[0])
        assert {path.rpartition(".")[2] for path in paths(sparse)} == {"up_proj", "gate_proj", "down_proj"}
    np.testing.assert_array_equal(*outputs)


def test_names_are_kept() -> None:
    model = gated_ffn()
    before = paths(model)
    assert name_layers(model) == 0 and paths(model) == before
    other = gated_ffn()
    for layer, name in zip(find_fully_connected(other), "abcdef", strict=True):
        layer.node.set_friendly_name(f"net.{name}")  # no role, but names that its user knows
    assert name_layers(other) == 0
    assert paths(other) == [f"net.{name}" for name in "abcdef"]


def test_what_is_not_recognized_stays_nameless() -> None:
    x = opset.parameter([-1, 8], np.float32, name="x")
    first = opset.matmul(x, opset.constant(np.ones((8, 8), np.float32)), False, True)
    first.set_friendly_name("MatMul_1")
    last = opset.relu(first)
    model = ov.Model([opset.result(last)], [x], "none")
    assert name_layers(model) == 0 and paths(model) == ["MatMul_1"]
    with pytest.raises(SCAPError, match="no layer of a known role"):
        sparsify_activations(model, "0.5", [{"x": np.ones((1, 8), np.float32)}])
