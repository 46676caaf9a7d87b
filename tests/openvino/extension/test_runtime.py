# SPDX-License-Identifier: Apache-2.0
import locale
from contextlib import suppress

import numpy as np
import openvino as ov
import pytest
from random_layers import activations, compile_node, parameter, random_layer, relative_error
from reference.scap import scap_linear

from optimum_scap.openvino.extension.build import build_extension
from optimum_scap.openvino.extension.nodes import create_feed_forward, create_linear


def feed_forward_model() -> ov.Model:
    layers = [random_layer(kind, 64, 96, 32, seed=2) for kind in ("i4", "u4_asym")]
    layers.append(random_layer("i8", 96, 64, seed=4))
    p = parameter(64)
    node = create_feed_forward(
        p,
        [layer.packed for layer in layers],
        "gelu_tanh",
        mode=0.1,
        threshold=1 / 3,
        hidden_mode=1e-7,
        hidden_threshold=0.123456789,
    )
    return ov.Model([node.output(0)], [p])


@pytest.fixture
def extended_core() -> ov.Core:
    core = ov.Core()
    core.add_extension(str(build_extension()))
    return core


def test_parallel_requests_on_several_streams():
    layer = random_layer("u4_asym", 576, 700, 64, seed=2)
    p = parameter(576, rank=2)
    node = create_linear(p, [layer.packed, layer.packed], threshold=0.5)
    compiled = compile_node(node, p, NUM_STREAMS="2", PERFORMANCE_HINT="THROUGHPUT")
    inputs = [activations((1 + i % 5 * 7, 576), i) for i in range(60)]
    results: dict[int, list[np.ndarray]] = {}
    queue = ov.AsyncInferQueue(compiled, 4)
    queue.set_callback(lambda request, i: results.setdefault(i, [t.data.copy() for t in request.output_tensors]))
    for i, x in enumerate(inputs):
        queue.start_async(x, i)
    queue.wait_all()
    for i, x in enumerate(inputs):
        expected = scap_linear(x, layer.weight, layer.bias, 0.0, 0.5)
        assert all(relative_error(result, expected) < 1e-3 for result in results[i])


def test_ir_round_trip_keeps_every_attribute(extended_core, tmp_path):
    model = feed_forward_model()
    ov.save_model(model, tmp_path / "model.xml")
    x = activations((1, 3, 64))
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    expected = extended_core.compile_model(model, "CPU", config)(x)[0]
    loaded = extended_core.read_model(tmp_path / "model.xml")
    np.testing.assert_array_equal(extended_core.compile_model(loaded, "CPU", config)(x)[0], expected)
    attributes = [
        next(op for op in m.get_ops() if op.get_type_name() == "SCAPFeedForward").get_attributes()
        for m in (model, loaded)
    ]
    assert attributes[0] == attributes[1]


def test_model_cache(extended_core, tmp_path):
    ov.save_model(feed_forward_model(), tmp_path / "model.xml")
    config = {"CACHE_DIR": str(tmp_path / "cache"), "INFERENCE_PRECISION_HINT": "f32"}
    x = activations((2, 1, 64))
    results = []
    for _ in range(2):
        compiled = extended_core.compile_model(tmp_path / "model.xml", "CPU", config)
        results.append(compiled(x)[0])
    assert compiled.get_property("LOADED_FROM_CACHE")
    np.testing.assert_array_equal(results[0], results[1])


def test_models_that_differ_in_values_only_do_not_share_a_cache_entry(extended_core, tmp_path):
    cases = ((1, 0.0), (1, 0.5), (3, 0.5))
    layers = [random_layer("i8", 64, 96, seed=seed) for seed, _ in cases]
    for index, (layer, (_, threshold)) in enumerate(zip(layers, cases, strict=True)):
        p = parameter(64, rank=2)
        model = ov.Model([create_linear(p, [layer.packed], threshold=threshold).output(0)], [p], "model")
        for number, node in enumerate(model.get_ordered_ops()):  # the names that OpenVINO makes up differ
            node.set_friendly_name(f"node_{number}")
        ov.save_model(model, tmp_path / f"{index}.xml")
    config = {"CACHE_DIR": str(tmp_path / "cache"), "INFERENCE_PRECISION_HINT": "f32"}
    x = activations((1, 64))
    for is_cached in (False, True):
        for index, (layer, (_, threshold)) in enumerate(zip(layers, cases, strict=True)):
            compiled = extended_core.compile_model(extended_core.read_model(tmp_path / f"{index}.xml"), "CPU", config)
            assert compiled.get_property("LOADED_FROM_CACHE") == is_cached
            assert relative_error(compiled(x)[0], scap_linear(x, layer.weight, layer.bias, 0.0, threshold)) < 1e-3


IN, OUT, THRESHOLD = 'in_features="64"', 'out_features="96, 96, 64"', 'threshold="0.3333333432674408"'
BYTES = 'activation_group_size="0"'
WEIGHTS, GROUPS, ZEROS = 'weight_types="u4, u4, u8"', 'group_sizes="32, 32, 0"', 'zero_points="8, -1, 128"'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (IN, 'in_features="0"', "in_features out of range"),
        (IN, 'in_features="-5"', "in_features out of range"),
        (IN, 'in_features="65"', r"input 1 must be u8 \[\d+\], got u8 \[\d+\]"),
        (IN, 'in_features="4611686018427387904"', "in_features out of range"),
        (IN, 'in_features="64x"', "in_features must be an integer, got '64x'"),
        (IN, 'in_features="99999999999999999999"', "in_features must be an integer"),
        (IN, "", "attribute in_features is missing"),
        (OUT, 'out_features=""', "attribute out_features is missing or empty"),
        (OUT, 'out_features="96"', "needs up and down, or gate, up and down; got 1 layers"),
        (OUT, 'out_features="96, 96"', "per-layer attributes must all have 2 entries"),
        (OUT, 'out_features="96, 96, 64, 1"', "needs up and down, or gate, up and down; got 4 layers"),
        (OUT, 'out_features="96, 97, 64"', "gate and up must have the same out_features"),
        (OUT, 'out_features="96, 96, 65"', r"input 3 must be u8 \[\d+\], got u8 \[\d+\]"),
        (OUT, 'out_features="96, 96, -64"', "out_features out of range"),
        (OUT, 'out_features="96, 96 64"', "out_features must be an integer, got '96 64'"),
        (OUT, 'out_features="96, 96, 64,"', "out_features must be an integer, got ''"),
        (GROUPS, 'group_sizes="-1, 32, 0"', "group_sizes must not be negative"),
        (GROUPS, 'group_sizes="1, 32, 0"', r"input 1 must be u8 \[\d+\], got u8 \[\d+\]"),
        (GROUPS, 'group_sizes="32, 32"', "per-layer attributes must all have 3 entries"),
        (WEIGHTS, 'weight_types="u4, u4, nf4"', "weight_types must be one of bf16, f16, f32, u4, u8; got 'nf4'"),
        (WEIGHTS, 'weight_types="u4, f32, u8"', "float weights have no zero_points and no group_sizes"),
        ('scale_types="f16, f16, f16"', 'scale_types="f16, f16, bf16"', "scale_types must be one of f16, f32"),
        (ZEROS, 'zero_points="8, -2, 128"', r"zero_points must lie in \[0, 15\].*got -2"),
        (ZEROS, 'zero_points="16, -1, 128"', r"zero_points must lie in \[0, 15\].*got 16"),
        (ZEROS, 'zero_points="8, -1, 256"', r"zero_points must lie in \[0, 255\].*got 256"),
        ('has_bias="1, 1, 1"', 'has_bias="1, 1, 0"', r"input 3 must be u8 \[\d+\], got u8 \[\d+\]"),
        ('has_bias="1, 1, 1"', 'has_bias="1, 1, 7"', "has_bias must be 0 or 1"),
        ('activation="gelu_tanh"', 'activation="mish"', "activation must be one of .*; got 'mish'"),
        ('activation="gelu_tanh"', "", "attribute activation is missing"),
        (BYTES, 'activation_group_size="8"', "activation_group_size must be 0 or at least 16, got 8"),
        (BYTES, 'activation_group_size="x"', "activation_group_size must be an integer, got 'x'"),
        ('precision="split" />', 'precision="int3" />', "precision must be one of bf16, f32, split; got 'int3'"),
        ('precision="split" />', "/>", "attribute precision is missing"),
        ('decode_only="false"', 'decode_only="maybe"', "decode_only must be one of false, true; got 'maybe'"),
        ('decode_only="false"', 'decode_only="TRUE"', "decode_only must be one of false, true; got 'TRUE'"),
        ('decode_only="false"', "", "attribute decode_only is missing"),
        (f" {THRESHOLD}", ' threshold="nan"', "threshold must be a finite float32 number, got 'nan'"),
        (f" {THRESHOLD}", ' threshold="-1"', "threshold must not be negative"),
        (f" {THRESHOLD}", ' threshold="1e39"', "threshold must be a finite float32 number, got '1e39'"),
        (f" {THRESHOLD}", ' threshold="1e999"', "threshold must be a finite float32 number, got '1e999'"),
        (f" {THRESHOLD}", ' threshold="0.5 or so"', "threshold must be a finite float32 number, got '0.5 or so'"),
        (f" {THRESHOLD}", "", "attribute threshold is missing"),
        (' hidden_threshold="', ' hidden_threshold="inf" was="', "hidden_threshold must be a finite float32 number"),
        (' hidden_threshold="', ' hidden_threshold="-2" was="', "hidden_threshold must not be negative"),
        (' hidden_mode="', ' hidden_mode="" was="', "attribute hidden_mode is missing or empty"),
        (' mode="', ' mode="-1e39" was="', "mode must be a finite float32 number, got '-1e39'"),
    ],
)
def test_malformed_ir_raises(extended_core, tmp_path, old, new, message):
    path = tmp_path / "model.xml"
    ov.save_model(feed_forward_model(), path)
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.raises(RuntimeError, match=message):
        extended_core.compile_model(path, "CPU")


def test_attributes_are_read_alike_in_every_locale(extended_core, tmp_path):
    """Programs that set their user's locale may write numbers with a comma."""
    ov.save_model(feed_forward_model(), tmp_path / "model.xml")
    x = activations((1, 3, 64))
    expected = extended_core.compile_model(tmp_path / "model.xml", "CPU")(x)[0]
    before = locale.setlocale(locale.LC_NUMERIC)
    try:
        for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "ru_RU.UTF-8"):
            with suppress(locale.Error):  # not installed here
                locale.setlocale(locale.LC_NUMERIC, name)
        if locale.localeconv()["decimal_point"] == ".":
            pytest.skip("no locale with a decimal comma is installed")
        compiled = extended_core.compile_model(tmp_path / "model.xml", "CPU")
    finally:
        locale.setlocale(locale.LC_NUMERIC, before)
    np.testing.assert_array_equal(compiled(x)[0], expected)


def test_missing_and_wrong_inputs_raise():
    packed = random_layer("i8", 16, 8).packed
    p = parameter(16)
    short = ov.op.Constant(packed.buffer[:-1].copy())
    cases = (
        ([p.output(0)], "needs x and one buffer per layer: 2 inputs, got 1"),
        ([p.output(0), short.output(0)], "input 1 must be u8"),
        ([p.output(0), p.output(0)], "input 1 must be u8"),
        ([], "needs x and one buffer per layer: 2 inputs, got 0"),
    )
    for inputs, message in cases:
        with pytest.raises(RuntimeError, match=message):
            node = create_linear(p, [packed])
            node.set_arguments(inputs)
            ov.Model([node.output(0)], [p]).validate_nodes_and_infer_types()
    with pytest.raises(RuntimeError, match="in_features"):
        create_linear(parameter(17), [packed])


@pytest.mark.parametrize("threshold", (-1.0, float("nan"), float("inf")))
def test_thresholds_that_mean_nothing_raise(threshold):
    with pytest.raises(RuntimeError, match="threshold"):
        create_linear(parameter(16), [random_layer("i8", 16, 8).packed], threshold=threshold)
