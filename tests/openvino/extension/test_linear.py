# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset13 as ops
from random_layers import KINDS, activations, compile_node, library_for, parameter, random_layer, relative_error
from reference.scap import ACTIVATIONS, scap_feed_forward, scap_linear

from optimum_scap.openvino.extension.build import ISA_FLAGS
from optimum_scap.openvino.extension.nodes import create_feed_forward, create_linear
from optimum_scap.openvino.extension.packing import pack_float


def threshold_at(x: np.ndarray, mode: float, sparsity: float) -> float:
    return float(np.quantile(np.abs(x - np.float32(mode)), sparsity)) if sparsity else 0.0


@given(
    kind=st.sampled_from(KINDS),
    in_features=st.sampled_from((1, 3, 17, 64, 333, 576)),
    out_features=st.sampled_from((1, 3, 17, 130, 576)),
    group_size=st.sampled_from((0, 1, 5, 32, 64, 100, 128)),
    batch=st.integers(1, 3),
    tokens=st.sampled_from((1, 2, 3, 4, 6, 7, 8, 9, 16, 33)),
    sparsity=st.sampled_from((0.0, 0.3, 0.5, 0.9, 1.0)),
    mode=st.sampled_from((0.0, 0.25, -3.0)),
    outliers=st.booleans(),
    precision=st.sampled_from(("f32", "split")),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_any_layer_agrees_with_float64(
    kind, in_features, out_features, group_size, batch, tokens, sparsity, mode, outliers, precision, seed
):
    layer = random_layer(kind, in_features, out_features, group_size, seed)
    x = activations((batch, tokens, in_features), seed, outliers)
    threshold = threshold_at(x, mode, sparsity)
    p = parameter(in_features)
    compiled = compile_node(create_linear(p, [layer.packed], mode=mode, threshold=threshold, precision=precision), p)
    expected = scap_linear(x, layer.weight, layer.bias, mode, threshold)
    assert relative_error(compiled(x)[0], expected) < 1e-3


@pytest.mark.parametrize("kind", ("f32", "i8", "u4_asym"))
@pytest.mark.parametrize(("in_features", "out_features"), ((1536, 576), (11008, 17), (3, 11008)))
@pytest.mark.parametrize("rows", (1, 257))
def test_large_layers_agree_with_float64(kind, in_features, out_features, rows):
    layer = random_layer(kind, in_features, out_features, 128 if kind == "u4_asym" else 0)
    x = activations((rows, in_features), outliers=True)
    threshold = threshold_at(x, 0.0, 0.5)
    p = parameter(in_features, rank=2)
    compiled = compile_node(create_linear(p, [layer.packed], threshold=threshold), p)
    assert relative_error(compiled(x)[0], scap_linear(x, layer.weight, layer.bias, 0.0, threshold)) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_whole_kilobytes(kind):
    layer = random_layer(kind, 70, 2048, 32, seed=2)
    x = activations((5, 70))
    p = parameter(70, rank=2)
    compiled = compile_node(create_linear(p, [layer.packed], threshold=0.3), p)
    for rows in (1, 5):
        expected = scap_linear(x[:rows], layer.weight, layer.bias, 0.0, 0.3)
        assert relative_error(compiled(x[:rows])[0], expected) < 1e-3


@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_every_instruction_set(isa):
    library = library_for(isa)
    for kind in KINDS:
        layer = random_layer(kind, 333, 130, 0 if "8" in kind else 48, seed=2)
        p = parameter(333, rank=2)
        compiled = compile_node(create_linear(p, [layer.packed], mode=0.1, threshold=0.5, library=library), p)
        for rows in (1, 3, 8, 40):
            x = activations((rows, 333), rows, outliers=True)
            assert relative_error(compiled(x)[0], scap_linear(x, layer.weight, layer.bias, 0.1, 0.5)) < 1e-3, kind


@given(
    kind=st.sampled_from(("i8", "u8_asym", "i4", "u4_asym")),
    in_features=st.sampled_from((1, 17, 64, 333, 576)),
    out_features=st.sampled_from((1, 17, 130, 576)),
    group_size=st.sampled_from((0, 5, 32, 100, 128)),
    activation_group_size=st.sampled_from((16, 17, 32, 64, 128, 256, 1000)),
    rows=st.sampled_from((2, 3, 8, 9, 16, 17, 33, 257)),
    sparsity=st.sampled_from((0.0, 0.5, 0.9)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_bytes_that_hold_the_activations_are_exact(
    kind, in_features, out_features, group_size, activation_group_size, rows, sparsity, seed
):
    layer = random_layer(kind, in_features, out_features, group_size, seed)
    # Of one magnitude per row, which a byte holds exactly whatever is in its group.
    rng = np.random.default_rng(seed)
    x = (rng.integers(-1, 2, (rows, in_features)) * 10.0 ** rng.uniform(-3, 3, (rows, 1))).astype(np.float32)
    threshold = threshold_at(x, 0.0, sparsity)
    p = parameter(in_features, rank=2)
    options = {"threshold": threshold, "activation_group_size": activation_group_size}
    result = compile_node(create_linear(p, [layer.packed], **options), p)(x)[0]
    assert relative_error(result, scap_linear(x, layer.weight, layer.bias, 0.0, threshold)) < 1e-5


@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_activations_of_one_byte_on_every_instruction_set(isa):
    library = library_for(isa)
    for kind in ("f32", "i8", "u8_asym", "i4", "u4_asym"):
        layer = random_layer(kind, 333, 130, 0 if "8" in kind else 48, seed=2)
        errors = {}
        for size in (0, 32):
            p = parameter(333, rank=2)
            settings = {"mode": 0.1, "threshold": 0.5, "activation_group_size": size, "library": library}
            compiled = compile_node(create_linear(p, [layer.packed], **settings), p)
            for rows in (1, 2, 8, 40):
                x = activations((rows, 333), rows, outliers=True)
                expected = scap_linear(x, layer.weight, layer.bias, 0.1, 0.5)
                errors[size, rows] = relative_error(compiled(x)[0], expected)
        assert max(errors[0, rows] for rows in (1, 2, 8, 40)) < 1e-3
        assert all(errors[32, rows] == errors[0, rows] for rows in (1, 2))  # a few tokens keep their two bytes
        assert max(errors.values()) < 1e-2, kind


def test_smaller_groups_of_activations_are_more_exact():
    layer = random_layer("i8", 1024, 200, seed=4)
    x = activations((20, 1024)) * np.exp(np.random.default_rng(0).normal(size=1024)).astype(np.float32)
    expected = scap_linear(x, layer.weight, layer.bias, 0.0, 0.0)
    errors = []
    for size in (0, 16, 64, 256):
        p = parameter(1024, rank=2)
        compiled = compile_node(create_linear(p, [layer.packed], activation_group_size=size), p)
        errors.append(relative_error(compiled(x)[0], expected))
    assert errors[0] < 1e-3 < errors[1] < errors[-1] < 3e-2


@pytest.mark.parametrize("rows", (1, 7))
@pytest.mark.parametrize("mode", (0.0, 0.3))
def test_thresholds_decide_exactly_as_the_portable_operations(rows, mode):
    threshold = np.float32(0.7)
    edge = [np.float32(mode) + sign * threshold for sign in (1, -1)]
    near = [np.nextafter(e, np.float32(s), dtype=np.float32) for e in edge for s in (-9, 9)]
    x = np.tile(np.array([*edge, *near, mode, 0.0, 5.0, 1e-40, -0.0], np.float32), (rows, 3))
    n = x.shape[1]
    p = parameter(n, rank=2)
    ours = compile_node(
        create_linear(p, [pack_float(np.eye(n, dtype=np.float32))], mode=mode, threshold=threshold, precision="f32"), p
    )
    p = parameter(n, rank=2)
    difference = ops.subtract(p, np.float32(mode))
    pruned = ops.less_equal(ops.absolute(difference), threshold)
    stock = compile_node(ops.select(pruned, np.float32(0), difference), p)
    np.testing.assert_array_equal(ours(x)[0], stock(x)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", (1, 4))
@pytest.mark.parametrize("precision", ("split", "f32"))
def test_nan_and_infinity_are_kept(kind, rows, precision):
    layer = random_layer(kind, 40, 33, 16, seed=3)
    p = parameter(40, rank=2)
    compiled = compile_node(create_linear(p, [layer.packed], threshold=100.0, precision=precision), p)
    x = activations((rows, 40))
    x[-1, 7] = np.nan
    result = compiled(x)[0]
    assert np.isnan(result[-1]).all()
    assert np.isfinite(result[:-1]).all()
    x[-1, 7] = np.inf
    result = compiled(x)[0]
    assert not np.isfinite(result[-1]).any()
    assert np.isfinite(result[:-1]).all()


@pytest.mark.parametrize("kind", ("i8", "u8_asym", "i4", "u4_asym"))
@pytest.mark.parametrize("rows", range(2, 10))
def test_few_rows_of_their_own_size_and_sparsity(kind, rows):
    layer = random_layer(kind, 1100, 300, 0 if "8" in kind else 128, seed=5)
    p = parameter(1100, rank=2)
    compiled = compile_node(create_linear(p, [layer.packed], mode=0.1, threshold=0.5), p)
    # Rows that keep everything, a little or nothing, and differ in size by more than an integer of 15 bits holds.
    x = activations((rows, 1100)) * np.float32(10.0) ** np.arange(-2, rows - 2, dtype=np.float32)[:, None]
    result, expected = compiled(x)[0], scap_linear(x, layer.weight, layer.bias, 0.1, 0.5)
    for row in range(rows):
        assert relative_error(result[row], expected[row]) < 1e-3


@pytest.mark.parametrize("scale", (1e-37, 1e-30, 1e30, 1e35))
def test_activations_far_out_of_range(scale):
    layer = random_layer("i8", 64, 48, seed=1)
    p = parameter(64, rank=2)
    compiled = compile_node(create_linear(p, [layer.packed]), p)
    for rows in (1, 5):
        x = (activations((rows, 64)) * np.float32(scale)).astype(np.float32)
        expected = scap_linear(x, layer.weight)
        assert np.abs(compiled(x)[0] - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("rows", (1, 3, 20))
def test_layers_of_different_kinds_share_an_input(rows):
    layers = [
        random_layer(kind, 333, out, group, seed=2)
        for kind, out, group in (("u4_asym", 64, 64), ("i8", 17, 0), ("i4", 130, 64), ("f16", 33, 0))
    ]
    p = parameter(333, rank=2)
    compiled = compile_node(create_linear(p, [layer.packed for layer in layers], mode=0.2, threshold=0.6), p)
    x = activations((rows, 333))
    for i, layer in enumerate(layers):
        assert relative_error(compiled(x)[i], scap_linear(x, layer.weight, layer.bias, 0.2, 0.6)) < 1e-3


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", (True, False))
def test_feed_forward(activation, gated):
    kinds = ("i4", "i4", "u8_asym") if gated else ("i8", "u4_asym")
    layers = [random_layer(kind, 96, 200, 32, seed=2) for kind in kinds[:-1]]
    layers.append(random_layer(kinds[-1], 200, 96, 64, seed=4))
    settings_ = {"mode": 0.1, "threshold": 0.5, "hidden_mode": 0.05, "hidden_threshold": 0.0}
    p = parameter(96)
    compiled = compile_node(create_feed_forward(p, [layer.packed for layer in layers], activation, **settings_), p)
    for tokens in (1, 9, 300):
        x = activations((1, tokens, 96))
        expected = scap_feed_forward(
            x, [layer.weight for layer in layers], [layer.bias for layer in layers], activation, **settings_
        )
        assert relative_error(compiled(x)[0], expected) < 1e-3


def test_feed_forward_prunes_its_hidden_activations():
    layers = [random_layer("f32", 64, 128, seed=2), random_layer("f32", 128, 64, seed=4)]
    p = parameter(64, rank=2)
    node = create_feed_forward(p, [layer.packed for layer in layers], "relu", hidden_threshold=8.0, precision="f32")
    compiled = compile_node(node, p)
    for rows in (1, 5):
        x = activations((rows, 64))
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        expected = scap_feed_forward(x, weights, biases, "relu", hidden_threshold=8.0)
        assert relative_error(compiled(x)[0], expected) < 1e-5
        assert relative_error(compiled(x)[0], scap_feed_forward(x, weights, biases, "relu")) > 1e-2


def test_rows_change_between_calls_and_may_be_none():
    layer = random_layer("i4", 100, 30, 32)
    for shape in ((100,), (4, 100), (2, 3, 100), (7, 1, 100), (0, 3, 100), (1, 1, 1, 100)):
        x = activations(shape)
        p = parameter(100, rank=len(shape))
        compiled = compile_node(create_linear(p, [layer.packed], threshold=0.4), p)
        result = compiled(x)[0]
        assert result.shape == (*shape[:-1], 30)
        if x.size:
            assert relative_error(result, scap_linear(x, layer.weight, layer.bias, 0.0, 0.4)) < 1e-3


def test_bf16_precision_rounds_many_rows_only():
    layer = random_layer("f32", 256, 64, seed=1)
    p = parameter(256, rank=2)
    compiled = compile_node(create_linear(p, [layer.packed], precision="bf16"), p, INFERENCE_PRECISION_HINT="bf16")
    assert relative_error(compiled(x := activations((1, 256)))[0], scap_linear(x, layer.weight)) < 1e-3
    assert relative_error(compiled(x := activations((64, 256)))[0], scap_linear(x, layer.weight)) < 1e-2
