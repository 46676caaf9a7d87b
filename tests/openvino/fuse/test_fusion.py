"""Fused models against portable ones: every weight format, both threshold patterns, whole FFNs and single layers."""

import platform
from collections.abc import Sequence

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as opset
from settled import is_settled
from synthetic import FORMATS, HIDDEN, compressed, gated_ffn, linear, samples

from optimum_scap import SCAPConfig, sparsify_activations
from optimum_scap.openvino.extension.build import build_extension
from optimum_scap.openvino.extension.packing import is_fast_for_dense_int4
from optimum_scap.openvino.fuse import fuse
from optimum_scap.openvino.graph import find_fully_connected
from optimum_scap.openvino.inference import EXACT
from optimum_scap.openvino.threshold_ops import find_threshold_ops
from optimum_scap.openvino.weights import is_integer


SPEC = "up=0.4,gate=0.4,down=0.6"


def outputs(model: ov.Model, x: np.ndarray) -> list[np.ndarray]:
    found = ov.Core().compile_model(model, "CPU", EXACT)({"x": x})
    return [found[index] for index in range(len(model.outputs))]


def kinds(model: ov.Model) -> dict[str, int]:
    names = [node.get_type_name() for node in model.get_ops()]
    return {name: names.count(name) for name in ("SCAPLinear", "SCAPFeedForward", "MatMul", "Select")}


def assert_close(
    fused: ov.Model,
    portable: ov.Model,
    rows: Sequence[int] = (40,),
    *,
    offset: float = 0.0,
    bound: float = 1e-3,
    rounding: float = 1e-5,
    sequences: int = 6,
) -> None:
    """Every token's outputs, in batches of up to `sequences` of `rows` tokens each, differ by less than `bound`.

    Rounding may move an activation across its threshold, on one CPU here and on another there, and one such channel
    is a visible difference. Hence tokens without an activation that near to its threshold: both must prune the same.
    """
    tokens = np.concatenate([sample["x"] for sample in samples(offset=offset)]).reshape(-1, HIDDEN)
    tokens = tokens[is_settled(portable, {"x": tokens[None]}, rounding).reshape(-1)]
    assert len(tokens) >= 40, "too many tokens are near a threshold"
    for count in rows:
        x = tokens[: len(tokens) // count * count][: sequences * count].reshape(-1, count, HIDDEN)
        for expected, found in zip(outputs(portable, x), outputs(fused, x), strict=True):
            errors = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
            assert errors.shape == x.shape[:2] and errors.max() < bound


@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("weights", [name for name in FORMATS if name != "nf4"])
def test_a_whole_ffn_becomes_one_operation(weights: str, mode: str) -> None:
    data = samples(offset=0.3)
    portable = compressed(gated_ffn(bias=mode == "mean"), weights)
    sparsify_activations(portable, SCAPConfig.from_spec(SPEC, mode=mode), data)
    fused = portable.clone()
    report = fuse(fused, precision="f32")
    assert len(report.fused) == 6 and not report.kept
    assert kinds(fused) == {"SCAPLinear": 0, "SCAPFeedForward": 2, "MatMul": 0, "Select": 0}
    assert_close(fused, portable, (1, 2, 7, 40), offset=0.3)


@pytest.mark.parametrize(("spec", "kind"), [(SPEC, "SCAPFeedForward"), ("up=0.4,gate=0.4", "SCAPLinear")])
@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_decode_only_is_fused_too(mode: str, spec: str, kind: str) -> None:
    data = samples(offset=0.3)
    config = SCAPConfig.from_spec(spec, mode=mode, apply_to="decode")
    portable = sparsify_activations(compressed(gated_ffn(), "int8_asym"), config, data)
    fused = portable.clone()
    assert not fuse(fused, precision="f32").kept
    assert kinds(fused)[kind] == 2 and kinds(fused)["Select"] == 0
    assert not any(node.get_type_name() == "ShapeOf" for node in fused.get_ops())
    assert_close(fused, portable, (1, 2, 40), offset=0.3)
    for sequences in (8, 9):
        assert_close(fused, portable, (1,), offset=0.3, sequences=sequences)


def test_layers_that_are_no_whole_ffn_are_fused_one_input_at_a_time() -> None:
    data = samples()
    portable = sparsify_activations(gated_ffn(), "up=0.4,gate=0.4", data)
    fused = portable.clone()
    fuse(fused, precision="f32")
    assert kinds(fused) == {"SCAPLinear": 2, "SCAPFeedForward": 0, "MatMul": 2, "Select": 0}
    assert_close(fused, portable)
    differing = sparsify_activations(gated_ffn(), "up=0.4,gate=0.3,down=0.5", data)
    fused = differing.clone()
    fuse(fused, precision="f32")
    assert kinds(fused) == {"SCAPLinear": 6, "SCAPFeedForward": 0, "MatMul": 0, "Select": 0}
    assert_close(fused, differing)


@pytest.mark.parametrize("weights", ["int4_asym", "int4_sym", "mixed"])
@pytest.mark.parametrize("bias", [False, True])
def test_dense_layers_of_int4_weights_use_the_operation_too(weights: str, bias: bool) -> None:
    data = samples()
    portable = sparsify_activations(compressed(gated_ffn(bias=bias), weights), "down=0.5", data)
    fused = portable.clone()
    report = fuse(fused, precision="f32", dense_int4=True)
    expected = {
        layer.path for layer in find_fully_connected(portable) if layer.role != "down" and is_integer(layer, (4,))
    }
    assert set(report.dense) == expected and len(report.fused) == 2
    if weights == "mixed":
        assert 0 < len(expected) < 4
    else:  # gate and up share their input, hence an operation
        assert len(expected) == 4
        assert kinds(fused) == {"SCAPLinear": 4, "SCAPFeedForward": 0, "MatMul": 0, "Select": 0}
    assert_close(fused, portable, (1, 2, 40))


def test_dense_layers_that_cannot_be_packed_stay() -> None:
    portable = sparsify_activations(compressed(gated_ffn(), "int4_asym"), "down=0.5", samples())
    gate = next(layer for layer in find_fully_connected(portable) if layer.role == "gate")
    subtract = gate.weights.get_node()
    while subtract.get_type_name() != "Subtract":
        subtract = subtract.input_value(0).get_node()
    shape = subtract.input_value(1).get_shape()
    subtract.input(1).replace_source_output(opset.constant(np.full(shape, 20, np.float16)).output(0))
    fused = portable.clone()
    report = fuse(fused, precision="f32", dense_int4=True)
    assert len(report.dense) == 2 and gate.path not in report.dense  # its whole group stays
    assert_close(fused, portable)


def test_dense_layers_use_the_operation_where_that_is_faster() -> None:
    portable = sparsify_activations(compressed(gated_ffn(), "int4_sym"), "down=0.5", samples())
    assert fuse(portable.clone()).dense == []  # an encoder, say: the operation gains where tokens come one by one
    state = opset.read_value(opset.constant(np.zeros(1, np.float32)), "past")
    portable.add_sinks([opset.assign(state, "past")])
    is_fast = is_fast_for_dense_int4(build_extension())
    assert len(fuse(portable.clone()).dense) == (4 if is_fast else 0)
    for settings in ({"precision": "f32"}, {"dense_int4": False}):
        fused = portable.clone()
        assert fuse(fused, **settings).dense == []
        assert kinds(fused)["MatMul"] == 4
    without_avx512 = build_extension("avx2" if platform.machine() == "x86_64" else "portable")
    assert not is_fast_for_dense_int4(without_avx512)
    for weights in ("f32", "int8_sym"):
        other = sparsify_activations(compressed(gated_ffn(), weights), "down=0.5", samples())
        assert fuse(other, dense_int4=True).dense == [] and kinds(other)["MatMul"] == 4
    dense = compressed(gated_ffn(), "int4_sym")
    assert fuse(dense, dense_int4=True).dense == [] and kinds(dense)["MatMul"] == 6


def test_an_ffn_whose_inner_values_are_read_elsewhere_keeps_them() -> None:
    data = samples()
    model = gated_ffn(blocks=1)
    product = next(node for node in model.get_ops() if node.get_type_name() == "Multiply")
    model.add_outputs([product.output(0)])
    portable = sparsify_activations(model, SPEC, data)
    fused = portable.clone()
    fuse(fused, precision="f32")
    assert kinds(fused)["SCAPFeedForward"] == 0 and kinds(fused)["SCAPLinear"] == 2
    assert_close(fused, portable)


@pytest.mark.parametrize(("make", "name"), [(opset.relu, "relu"), (lambda x: opset.gelu(x, "TANH"), "gelu")])
def test_an_ffn_without_gate(make, name: str) -> None:
    rng = np.random.default_rng(3)
    x = opset.parameter([-1, -1, HIDDEN], np.float32, name="x")
    x.output(0).set_names({"x"})
    up = linear(x, HIDDEN, 96, "layers.0.fc1", rng, True, False)
    down = linear(make(up), 96, HIDDEN, "layers.0.fc2", rng, True, False)
    model = ov.Model([opset.result(opset.add(x, down))], [x], name)
    data = samples()
    portable = sparsify_activations(model, "up=0.5,down=0.7", data)
    fused = portable.clone()
    fuse(fused, precision="f32")
    assert kinds(fused)["SCAPFeedForward"] == 1
    assert_close(fused, portable)


def test_weights_stored_input_first_and_f16() -> None:
    data = samples()
    portable = sparsify_activations(gated_ffn(transposed=True, bias=True), SPEC, data)
    for constant in [node for node in portable.get_ops() if node.get_friendly_name().endswith(".weight")]:
        half = opset.convert(opset.constant(constant.data.astype(np.float16)), "f32")
        for reader in list(constant.output(0).get_target_inputs()):
            reader.replace_source_output(half.output(0))
    fused = portable.clone()
    assert len(fuse(fused, precision="f32").fused) == 6
    assert_close(fused, portable)


def nncf_pattern(mode: float, threshold: float = 0.5) -> ov.Model:
    """What NNCF's sparsifier exports: Abs -> LessEqual -> Select of x itself (masked_fill), here with any fill."""
    rng = np.random.default_rng(5)
    x = opset.parameter([-1, -1, HIDDEN], np.float32, name="x")
    x.output(0).set_names({"x"})
    centered = opset.subtract(x, opset.constant(np.float32(mode))) if mode else x
    mask = opset.less_equal(opset.abs(centered), opset.constant(np.float32(threshold)))
    fill = opset.constant(np.float32(mode))
    pruned = opset.select(mask, fill, x)
    return ov.Model([opset.result(linear(pruned, HIDDEN, 48, "layers.0.up_proj", rng, False, False))], [x], "nncf")


@pytest.mark.parametrize("mode", [0.0, 0.25])
def test_the_pattern_of_nncf_is_recognized(mode: float) -> None:
    portable = nncf_pattern(mode)
    fused = portable.clone()
    assert fuse(fused, precision="f32").fused == ["layers.0.up_proj"]
    assert_close(fused, portable, bound=1e-4)


def test_what_the_operation_cannot_read_stays_and_says_why() -> None:
    import nncf

    data = samples(count=8)
    nf4 = sparsify_activations(compressed(gated_ffn(), "nf4"), SPEC, data)
    before = kinds(nf4)
    report = fuse(nf4)
    assert kinds(nf4) == before
    assert len(report.kept) == 6 and all("nf4" in reason for reason in report.kept.values())
    quantized = nncf.quantize(gated_ffn(), nncf.Dataset(data), model_type=nncf.ModelType.TRANSFORMER)
    report = fuse(sparsify_activations(quantized, SPEC, data))
    assert len(report.kept) == 6 and set(report.kept.values()) == {"quantized activations"}


def test_a_threshold_that_keeps_everything_stays_stock() -> None:
    for threshold in (-1.0, np.nan):
        model = nncf_pattern(0.0, threshold)
        assert list(fuse(model).kept) == ["layers.0.up_proj"]
        assert np.isfinite(outputs(model, samples()[0]["x"])[0]).all()


def test_nothing_to_fuse() -> None:
    model = gated_ffn()
    before = kinds(model)
    assert fuse(model).fused == []
    assert kinds(model) == before
    assert find_threshold_ops(model) == []


def test_the_default_precision_is_accurate_for_one_token() -> None:
    data = samples()
    for weights in ("int8_asym", "int4_sym"):
        portable = sparsify_activations(compressed(gated_ffn(), weights), SPEC, data)
        fused = portable.clone()
        fuse(fused)
        assert_close(fused, portable, (1,), rounding=1e-3)
