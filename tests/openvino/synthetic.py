"""Small IRs made in the test: a gated FFN in every weight format, named as optimum-intel's exporter names things."""

import nncf
import numpy as np
import openvino as ov
from openvino import opset13 as opset


HIDDEN, INNER = 64, 160


def gated_ffn(seed: int = 0, bias: bool = False, blocks: int = 2, transposed: bool = False) -> ov.Model:
    """x -> blocks of x + down(silu(gate(x)) * up(x)); input `x` [batch, tokens, HIDDEN] float32."""
    rng = np.random.default_rng(seed)
    x = opset.parameter([-1, -1, HIDDEN], np.float32, name="x")
    x.output(0).set_names({"x"})
    value = x
    for block in range(blocks):
        path = f"model.layers.{block}.mlp"
        gate = linear(value, HIDDEN, INNER, f"{path}.gate_proj", rng, bias, transposed)
        up = linear(value, HIDDEN, INNER, f"{path}.up_proj", rng, bias, transposed)
        inner = opset.multiply(opset.swish(gate), up)
        down = linear(inner, INNER, HIDDEN, f"{path}.down_proj", rng, bias, transposed)
        value = opset.add(value, down)
    result = opset.result(value)
    result.output(0).set_names({"y"})
    return ov.Model([result], [x], "ffn")


def linear(
    x: ov.Node, inputs: int, outputs: int, path: str, rng: np.random.Generator, bias: bool, transposed: bool
) -> ov.Node:
    weights = (rng.standard_normal((outputs, inputs)) / np.sqrt(inputs)).astype(np.float32)
    constant = opset.constant(np.ascontiguousarray(weights.T) if transposed else weights)
    constant.set_friendly_name(f"{path}.weight")
    node = opset.matmul(x, constant, False, not transposed)
    node.set_friendly_name(f"__module.{path}/aten::linear/MatMul")
    if bias:
        node = opset.add(node, opset.constant(rng.standard_normal((1, 1, outputs)).astype(np.float32)))
    return node


def compressed(model: ov.Model, name: str) -> ov.Model:
    """`model` with its weights compressed by NNCF in place."""
    modes = nncf.CompressWeightsMode
    settings: dict[str, dict] = {
        "f32": {},
        "int8_asym": {"mode": modes.INT8_ASYM},
        "int8_sym": {"mode": modes.INT8_SYM},
        "int4_asym": {"mode": modes.INT4_ASYM, "group_size": 32, "all_layers": True},
        "int4_sym": {"mode": modes.INT4_SYM, "group_size": 32, "all_layers": True},
        "mixed": {"mode": modes.INT4_ASYM, "group_size": 16, "ratio": 0.5},
        "nf4": {"mode": modes.NF4, "group_size": 32, "all_layers": True},
    }
    return nncf.compress_weights(model, **settings[name]) if settings[name] else model


FORMATS = ("f32", "int8_asym", "int8_sym", "int4_asym", "int4_sym", "mixed", "nf4")


def samples(count: int = 6, tokens: int = 40, seed: int = 1, offset: float = 0.0) -> list[dict[str, np.ndarray]]:
    """Activations with channels of very different scale, as LLMs have them."""
    rng = np.random.default_rng(seed)
    scale = 10 ** rng.uniform(-1, 1, HIDDEN)
    shape = (1, tokens, HIDDEN)
    return [{"x": (rng.standard_normal(shape) * scale + offset).astype(np.float32)} for _ in range(count)]
