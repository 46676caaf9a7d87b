# SPDX-License-Identifier: Apache-2.0
"""A scale per channel in the criterion: keep where scale * |x - mode| > threshold, each step rounded to float32."""

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from random_layers import activations, compile_node, library_for, parameter, random_layer, relative_error

from optimum_scap.openvino.extension.build import ISA_FLAGS, build_extension
from optimum_scap.openvino.extension.nodes import create_feed_forward, create_linear
from optimum_scap.openvino.extension.packing import PackedLayer, pack_float, pack_integer


MODE, THRESHOLD = np.float32(0.3), np.float32(0.7)
ROWS = (1, 5, 20, 300)  # one, few and many


def prune(x: np.ndarray, scale: np.ndarray, mode: float = MODE, threshold: float = THRESHOLD) -> np.ndarray:
    difference = x - np.float32(mode)
    with np.errstate(invalid="ignore"):
        return np.where(scale * np.abs(difference) <= np.float32(threshold), np.float32(0), difference)


def on_the_edge(rows: int, repeats: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """(x ``[rows, n]``, scale ``[n]``) exactly on the threshold after scaling, next to it, and far from it."""
    rng = np.random.default_rng(rows)
    scale = np.concatenate([np.float32(2.0) ** np.arange(-4, 5), rng.random(20).astype(np.float32) + np.float32(0.1)])
    scale = np.tile(scale.astype(np.float32), repeats)
    edge = MODE + np.where(np.arange(scale.size) % 2, 1, -1).astype(np.float32) * (THRESHOLD / scale)
    steps = rng.integers(-2, 3, (rows, scale.size))
    x = np.tile(edge, (rows, 1))
    for _ in range(2):
        x = np.where(
            steps > 0, np.nextafter(x, np.float32(99)), np.where(steps < 0, np.nextafter(x, np.float32(-99)), x)
        )
        steps -= np.sign(steps)
    # With these every product is exact.
    x[:, :2], scale[:2] = MODE + THRESHOLD * np.float32([4, -2]), np.float32([0.25, 0.5])
    return x.astype(np.float32), scale


def identity(n: int, kind: str) -> PackedLayer:
    if kind == "f32":
        return pack_float(np.eye(n, dtype=np.float32))
    return pack_integer(np.eye(n, dtype=np.int8), np.ones((n, 1), np.float32), bits=int(kind[1:]), signed=True)


@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_decides_exactly_in_every_instruction_set(isa):
    library = library_for(isa)
    for rows in ROWS:
        x, scale = on_the_edge(rows)
        expected = prune(x, scale)
        assert (expected == 0).any() and (expected != 0).any()
        settings = {"mode": MODE, "threshold": THRESHOLD, "scale": scale, "library": library}
        for kind, precision in (("f32", "f32"), ("f32", "split"), ("i8", "split"), ("i4", "split"), ("i8", "f32")):
            layer = identity(scale.size, kind)
            p = parameter(scale.size, rank=2)
            result = compile_node(create_linear(p, [layer], precision=precision, **settings), p)(x)[0]
            np.testing.assert_array_equal(result != 0, expected != 0)
            if precision == "f32":
                np.testing.assert_array_equal(result, expected)
            else:
                assert relative_error(result, expected) < 1e-3


@pytest.mark.parametrize("isa", ISA_FLAGS)
def test_hidden_activations_have_scales_of_their_own(isa):
    library = library_for(isa)
    for rows in ROWS:
        hidden, hidden_scale = on_the_edge(rows)
        n = hidden_scale.size
        p = parameter(n, rank=2)
        for kind, precision in (("f32", "f32"), ("i8", "f32"), ("f32", "split")):
            layers = [identity(n, kind)] * 2
            settings = {"hidden_mode": MODE, "hidden_threshold": THRESHOLD, "hidden_scale": hidden_scale}
            node = create_feed_forward(p, layers, "identity", precision=precision, library=library, **settings)
            result = compile_node(node, p)(hidden)[0]
            expected = prune(hidden, hidden_scale)
            if precision == "f32":
                np.testing.assert_array_equal(result, expected)
            else:  # bytes and tiles round what is near the threshold
                near = np.abs(hidden_scale * np.abs(hidden - MODE) - THRESHOLD) < 1e-3 * THRESHOLD
                np.testing.assert_array_equal((result != 0) | near, (expected != 0) | near)


@pytest.mark.parametrize("kinds", (("i4", "u4_asym", "i8"), ("f32", "bf16", "f16"), ("i8", "u8_asym")))
@pytest.mark.parametrize("precision", ("split", "f32"))
def test_both_scales_of_a_feed_forward(kinds, precision):
    layers = [random_layer(kind, 96, 700, 32, seed=2) for kind in kinds[:-1]]
    layers.append(random_layer(kinds[-1], 700, 96, 64, seed=4))
    rng = np.random.default_rng(0)
    scale, hidden_scale = (rng.integers(0, 3, n).astype(np.float32) for n in (96, 700))
    p = parameter(96, rank=2)
    node = create_feed_forward(
        p, [layer.packed for layer in layers], "relu", mode=0.1, threshold=0.5, scale=scale,
        hidden_mode=0.05, hidden_threshold=0.01, hidden_scale=hidden_scale, precision=precision,
    )  # fmt: skip
    compiled = compile_node(node, p)
    for rows in ROWS:
        x = activations((rows, 96))
        pruned = prune(x, scale, 0.1, 0.5).astype(np.float64)
        hidden = [pruned @ layer.weight.T + layer.bias for layer in layers[:-1]]
        hidden[0] = np.maximum(hidden[0], 0)
        kept = prune(np.prod(hidden, axis=0).astype(np.float32), hidden_scale, 0.05, 0.01).astype(np.float64)
        assert relative_error(compiled(x)[0], kept @ layers[-1].weight.T + layers[-1].bias) < 1e-3


@pytest.mark.parametrize("rows", (1, 4, 40))
@pytest.mark.parametrize("precision", ("split", "f32"))
def test_nan_and_infinity_are_kept_whatever_their_scale(rows, precision):
    layer = random_layer("i8", 40, 33, seed=3)
    scale = np.zeros(40, np.float32)
    p = parameter(40, rank=2)
    node = create_linear(p, [layer.packed], threshold=100.0, scale=scale, precision=precision)
    compiled = compile_node(node, p)
    x = activations((rows, 40))
    assert not compiled(x)[0].any()  # no bias: nothing is left
    for value in (np.nan, np.inf, -np.inf):  # 0 times infinity is NaN
        x[-1, 7] = value
        result = compiled(x)[0]
        assert not np.isfinite(result[-1]).any() and not result[:-1].any()


def test_what_is_dense_in_prompts_knows_no_scale():
    scale = np.zeros(8, np.float32)
    p = parameter(8)
    node = create_linear(p, [identity(8, "f32")], threshold=0.5, scale=scale, decode_only=True, precision="f32")
    compiled = compile_node(node, p)
    x = activations((2, 3, 8))
    np.testing.assert_array_equal(compiled(x)[0], x)
    assert not compiled(x[:, :1])[0].any()


@pytest.mark.parametrize("hint", ("f32", "bf16"))
def test_scales_arrive_unchanged(hint):
    x, scale = on_the_edge(1)
    p = parameter(scale.size, rank=2)
    node = create_linear(
        p, [identity(scale.size, "f32")], mode=MODE, threshold=THRESHOLD, scale=scale, precision="f32"
    )
    compiled = compile_node(node, p, INFERENCE_PRECISION_HINT=hint)
    np.testing.assert_array_equal(compiled(x)[0], prune(x, scale))


def feed_forward(**scales: np.ndarray) -> tuple[ov.Node, ov.Node]:
    layers = [random_layer("i8", 64, 96, seed=2), random_layer("i8", 96, 64, seed=4)]
    p = parameter(64, rank=2)
    packed = [layer.packed for layer in layers]
    return create_feed_forward(p, packed, "silu", threshold=0.5, hidden_threshold=0.5, **scales), p


@pytest.fixture
def extended_core() -> ov.Core:
    core = ov.Core()
    core.add_extension(str(build_extension()))
    return core


SCALES = {"scale": np.linspace(0, 2, 64), "hidden_scale": np.linspace(3, 0, 96)}


@pytest.mark.parametrize("names", ((), ("scale",), ("hidden_scale",), ("scale", "hidden_scale")))
def test_ir_round_trip(extended_core, tmp_path, names):
    node, p = feed_forward(**{name: SCALES[name] for name in names})
    named = ", ".join(name.removesuffix("scale").rstrip("_") or "input" for name in names)
    assert node.get_attributes()["scaled"] == named
    x = activations((3, 64))
    expected = compile_node(node, p)(x)[0]
    path = tmp_path / "model.xml"
    ov.save_model(ov.Model([node.output(0)], [p]), path, compress_to_fp16=False)
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    np.testing.assert_array_equal(extended_core.compile_model(path, "CPU", config)(x)[0], expected)
    if not names:  # as it was written before there were scales
        text = path.read_text()
        assert text.count(' scaled=""') == 1
        path.write_text(text.replace(' scaled=""', ""))
        np.testing.assert_array_equal(extended_core.compile_model(path, "CPU", config)(x)[0], expected)


@pytest.mark.parametrize("text", ("inputs", "hidden, input", "input,hidden", "input, hidden, input", "true", "1"))
def test_malformed_attribute_is_named(extended_core, tmp_path, text):
    node, p = feed_forward(**SCALES)
    path = tmp_path / "model.xml"
    ov.save_model(ov.Model([node.output(0)], [p]), path, compress_to_fp16=False)
    path.write_text(path.read_text().replace('scaled="input, hidden"', f'scaled="{text}"'))
    with pytest.raises(RuntimeError, match=f"scaled must be empty or one of .*; got '{text}'"):
        extended_core.compile_model(path, "CPU")


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("", "needs x and one buffer per layer: 2 inputs, got 3"),
        ("hidden", "scaled must be empty or 'input'; got 'hidden'"),
        ("input, hidden", "scaled must be empty or 'input'; got 'input, hidden'"),
    ),
)
def test_a_linear_has_no_hidden_activations(text, message):
    p = parameter(16)
    node = create_linear(p, [random_layer("i8", 16, 8).packed], scale=np.ones(16))
    node.set_attribute("scaled", text)
    with pytest.raises(RuntimeError, match=message):
        ov.Model([node.output(0)], [p]).validate_nodes_and_infer_types()


def test_scales_may_be_computed_and_wrong_ones_are_refused():
    x, scale = on_the_edge(2)
    n = scale.size
    settings = {"mode": MODE, "threshold": THRESHOLD, "precision": "f32"}

    def model_with(*scales: ov.Node) -> ov.Model:
        p = parameter(n, rank=2)
        node = create_linear(p, [identity(n, "f32")], scale=np.ones(n), **settings)
        node.set_arguments([*node.input_values()[:2], *(scale.output(0) for scale in scales)])
        model = ov.Model([node.output(0)], [p, *scales])
        model.validate_nodes_and_infer_types()
        return model

    model = model_with(ops.parameter([n], np.float32))
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_array_equal(compiled([x, scale])[0], prune(x, scale))

    wrong = (([n], np.float16), ([n + 1], np.float32), ([1, n], np.float32), ([-1], np.float32), ([], np.float32))
    for shape, dtype in wrong:
        with pytest.raises(RuntimeError, match=rf"input 2 must be f32 \[{n}\], got"):
            model_with(ops.parameter(shape, dtype))
    with pytest.raises(RuntimeError, match="needs x and one buffer per layer and the scales: 3 inputs, got 2"):
        model_with()


@pytest.mark.parametrize(
    ("scale", "message"),
    (
        (np.ones(15), r"must be \[16\], got \[15\]"),
        (np.ones((1, 16)), r"must be \[16\], got \[1, 16\]"),
        (np.float32(1), r"must be \[16\], got \[\]"),
        (np.full(16, -1.0), "must be finite in float32 and not negative"),
        (np.full(16, np.nan), "must be finite in float32 and not negative"),
        (np.full(16, 1e39), "must be finite in float32 and not negative"),
    ),
)
def test_scales_that_mean_nothing_are_refused(scale, message):
    p = parameter(16)
    layer = random_layer("i8", 16, 16).packed
    with pytest.raises(ValueError, match=f"^scale {message}"):
        create_linear(p, [layer], scale=scale)
    with pytest.raises(ValueError, match=f"^scale {message}"):
        create_feed_forward(p, [layer, layer], "silu", scale=scale)
    with pytest.raises(ValueError, match=f"^hidden_scale {message}"):
        create_feed_forward(p, [layer, layer], "silu", hidden_scale=scale)
