"""The kernels over INT4 and INT8 weights, against float64."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from integer_problems import KINDS, in_float64, random_integers
from kernel_problems import DEVICE, DTYPES, Layer, assert_close, expected, random_input
from torch import Tensor

from optimum_scap.torch import kernels
from optimum_scap.torch.kernels import library, reference
from optimum_scap.torch.weights import IntegerWeights, Weights, find_format


pytest.importorskip("triton")
from optimum_scap.torch.kernels import launch  # noqa: E402
from optimum_scap.torch.kernels.configurations import LaunchConfiguration, rule_of_thumb, shape_key  # noqa: E402


ON_GPU = DEVICE.type == "cuda"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
CONFIGURATIONS = (
    None,
    LaunchConfiguration(num_warps=1, unroll=4, slices=3, sum_block=32, lane_bytes=4),
    LaunchConfiguration(num_warps=1, unroll=8, slices=1, sum_block=64, lane_bytes=8),
    LaunchConfiguration(num_warps=2, unroll=4, slices=4, sum_block=32, lane_bytes=16),
    LaunchConfiguration(num_warps=1, unroll=2, slices=2, sum_block=32, lane_bytes=8),  # not in fixed point
)
each_format = pytest.mark.parametrize("bits", [4, 8])
each_kind = pytest.mark.parametrize("kind", KINDS)


class IntegerLayer(Layer):
    """A layer whose `weight` is what its integers stand for."""

    packed: Weights


def random_layer(
    generator: torch.Generator,
    bits: int,
    in_features: int,
    out_features: int,
    group_size: int,
    kind: str = "symmetric",
    threshold: float = 0.7,
    mode: float = 0.0,
    scale_dtype: torch.dtype = torch.float16,
) -> IntegerLayer:
    weights = random_integers(generator, bits, out_features, in_features, group_size, kind, scale_dtype)
    bias = torch.randn(out_features, generator=generator).to(DEVICE) if out_features % 2 else None
    layer = IntegerLayer(
        in_float64(weights).to(DEVICE), bias, float(torch.tensor(threshold)), float(torch.tensor(mode))
    )
    layer.packed = find_format(f"int{bits}").pack(
        IntegerWeights(bits, *(None if tensor is None else tensor.to(DEVICE) for tensor in weights[1:]))
    )
    return layer


def group_arguments(x: Tensor, layers: Sequence[IntegerLayer]):
    return (
        x,
        [tensor for layer in layers for tensor in layer.packed.tensors],
        layers[0].packed.format,
        [layer.bias for layer in layers],
        [layer.threshold for layer in layers],
        [layer.mode for layer in layers],
        [layer.scale for layer in layers],
    )


def linear(implementation, x: Tensor, layer: IntegerLayer, *configuration: LaunchConfiguration | None) -> Tensor:
    return implementation.sparse_linear_group(*group_arguments(x, [layer]), *configuration)[0]


@settings(
    max_examples=250 if ON_GPU else 16,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    bits=st.sampled_from([4, 8]),
    kind=st.sampled_from(KINDS),
    group_size=st.sampled_from([1, 5, 16, 32, 64, 128]),
    groups=st.integers(1, 6),
    per_channel=st.booleans(),
    out_features=st.integers(1, 1500 if ON_GPU else 150),
    rows=st.sampled_from([1, 1, 1, 2, 3, 8]),
    dtype=st.sampled_from(DTYPES),
    scale_dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from([0.0, 0.25]),
    threshold=st.sampled_from([-1.0, 0.0, 0.7, 1.5, 1e30]),
    with_scale=st.booleans(),
    configuration=st.sampled_from(CONFIGURATIONS),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    bits,
    kind,
    group_size,
    groups,
    per_channel,
    out_features,
    rows,
    dtype,
    scale_dtype,
    mode,
    threshold,
    with_scale,
    configuration,
    seed,
) -> None:
    in_features = group_size * min(groups, 200 // group_size)
    generator = torch.Generator().manual_seed(seed)
    layer = random_layer(
        generator,
        bits,
        in_features,
        out_features,
        in_features if per_channel else group_size,
        kind,
        threshold,
        mode,
        scale_dtype,
    )
    if with_scale:
        layer.scale = (0.5 + torch.rand(in_features, generator=generator)).to(DEVICE)
    x = random_input(generator, rows, in_features, dtype)
    wanted = expected(x, layer)
    y = linear(launch, x, layer, configuration)
    assert y.dtype == dtype
    assert_close(y, wanted)
    assert_close(linear(reference, x, layer), wanted)


@each_format
@each_kind
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 4] if ON_GPU else [1, 4])
def test_layers_of_a_group_have_thresholds_modes_and_sizes_of_their_own(
    bits: int, kind: str, rows: int, count: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    layers = [
        random_layer(generator, bits, 96, 130, 32, kind, threshold=0.4, mode=0.25),
        random_layer(generator, bits, 96, 61, 32, kind, threshold=1.1),
        random_layer(generator, bits, 96, 300, 32, kind, threshold=-1.0, mode=-0.5),
        random_layer(generator, bits, 96, 1, 32, kind, threshold=100.0),
    ][:count]
    layers[-1].scale = (0.5 + torch.rand(96, generator=generator)).to(DEVICE)
    x = random_input(generator, rows, 96, torch.float32)
    for y, layer in zip(launch.sparse_linear_group(*group_arguments(x, layers)), layers, strict=True):
        assert_close(y, expected(x, layer))


@each_format
@each_kind
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_linear(bits: int, kind: str, activation: str) -> None:
    generator = torch.Generator().manual_seed(2)
    for rows in (1, 2):
        gate = random_layer(generator, bits, 64, 41, 16, kind, threshold=0.4, mode=0.25)
        up = random_layer(generator, bits, 64, 41, 16, kind, threshold=0.8)
        x = random_input(generator, rows, 64, torch.float32)
        y = launch.sparse_gated_linear(
            x,
            gate.packed.tensors,
            up.packed.tensors,
            gate.packed.format,
            gate.bias,
            up.bias,
            gate.threshold,
            up.threshold,
            gate.mode,
            up.mode,
            gate.scale,
            up.scale,
            activation,
        )
        assert_close(y, reference.ACTIVATIONS[activation](expected(x, gate)) * expected(x, up))


@each_format
@each_kind
def test_layers_that_stay_dense(bits: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    layers = [random_layer(generator, bits, 32, size, 16, kind, threshold=-1.0) for size in (32, 33, 7, 65)]
    x = random_input(generator, 1, 32, torch.float16)
    x[0, 5] = 0.0
    arguments = group_arguments(x, layers)[:4]
    for y, layer in zip(launch.linear_group(*arguments), layers, strict=True):
        assert_close(y, expected(x, layer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [0.0, 0.375])
def test_values_at_the_threshold_are_pruned(dtype: torch.dtype, mode: float) -> None:
    generator = torch.Generator().manual_seed(4)
    x = random_input(generator, 1, 64, dtype)
    distances = (x[0].float() - mode).abs()
    layer = random_layer(generator, 4, 64, 33, 64, threshold=float(distances.sort().values[32]), mode=mode)
    assert_close(linear(launch, x, layer), expected(x, layer))


@each_format
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spoils_its_row_alone(bits: int, rows: int, special: float) -> None:
    generator = torch.Generator().manual_seed(5)
    layer = random_layer(generator, bits, 48, 40, 16, threshold=1e30)
    x = random_input(generator, rows, 48, torch.float16)
    x[-1, 7] = special
    y = linear(launch, x, layer)
    assert not torch.isfinite(y[-1]).any()
    assert_close(y[:-1], expected(x[:-1], layer))


@each_format
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0, 3e4])
def test_inputs_of_very_different_sizes(bits: int, size: float) -> None:
    """What fixed point loses is measured by the largest input of a slice, as what float32 sums lose is."""
    generator = torch.Generator().manual_seed(6)
    layer = random_layer(generator, bits, 128, 70, 64, "offsets", threshold=-1.0)
    x = size * random_input(generator, 1, 128, torch.float32)
    x[0, ::9] *= 1000.0
    y = linear(launch, x, layer).double()
    terms = x.double().abs() @ layer.weight.abs().t()
    assert ((y - expected(x, layer)).abs() <= 1e-6 * (terms + (layer.bias is not None))).all()


def test_long_slices() -> None:
    generator = torch.Generator().manual_seed(7)
    layer = random_layer(generator, 8, 16 * 32 + 77, 20, 16 * 32 + 77, threshold=1.6)
    x = random_input(generator, 1, layer.weight.shape[1], torch.float32)
    one_slice = LaunchConfiguration(num_warps=1, unroll=8, slices=1, sum_block=32, lane_bytes=4)
    assert_close(linear(launch, x, layer, one_slice), expected(x, layer))


@each_format
@pytest.mark.parametrize("rows", [1, 2])
def test_repeated_runs_agree_bit_by_bit_and_write_every_element(bits: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(8)
    layer = random_layer(generator, bits, 48, 130, 16)
    x = random_input(generator, rows, 48, torch.float16)
    first = linear(launch, x, layer, CONFIGURATIONS[1])
    for _ in range(20 if ON_GPU else 2):
        # What the allocator hands out next is full of NaN.
        poison = [torch.full((size,), torch.nan, device=DEVICE) for size in (2 * 130, 3 * 2 * 130, 4096)]
        del poison
        assert torch.equal(first, linear(launch, x, layer, CONFIGURATIONS[1]))


def feed_forward(generator: torch.Generator, bits: int, features: int, hidden: int, group_size: int):
    gate, up = (random_layer(generator, bits, features, hidden, group_size, threshold=t) for t in (0.4, 0.6))
    down = random_layer(generator, bits, hidden, features, group_size, threshold=0.1, mode=0.0625)

    def run(x: Tensor) -> Tensor:
        return kernels.sparse_feed_forward(
            x,
            gate.packed,
            up.packed,
            down.packed,
            gate.bias,
            up.bias,
            down.bias,
            gate_threshold=gate.threshold,
            up_threshold=up.threshold,
            down_threshold=down.threshold,
            down_mode=down.mode,
        )

    def wanted(x: Tensor) -> Tensor:
        hidden_states = reference.ACTIVATIONS["silu"](expected(x, gate)) * expected(x, up)
        return expected(hidden_states.to(x.dtype), down)

    return run, wanted


@each_format
@pytest.mark.timeout(300)
def test_operations_take_integer_weights(bits: int) -> None:
    generator = torch.Generator().manual_seed(9)
    run, wanted = feed_forward(generator, bits, 64, 96, 32)
    x = random_input(generator, 1, 64, torch.float32)
    compiled = torch.compile(run, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    with torch.no_grad():
        assert_close(run(x), wanted(x))
        assert_close(compiled(x), wanted(x))


@each_format
@each_kind
def test_opcheck(bits: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(10)
    a, b = (random_layer(generator, bits, 32, 48, 16, kind) for _ in range(2))
    x = random_input(generator, 2, 32, torch.float16)
    scale = torch.rand(32, generator=generator).to(DEVICE)
    tensors, name = list(a.packed.tensors), a.packed.format
    torch.library.opcheck(library.sparse_linear, (x, tensors, name, a.bias, 0.5, 0.0, scale))
    both = [*tensors, *b.packed.tensors]
    torch.library.opcheck(
        library.sparse_linear_group, (x, both, name, [a.bias, b.bias], [0.5, 0.6], [0.0, 0.25], [None, scale])
    )
    torch.library.opcheck(library.linear_group, (x[:1], both, name, [None, None]))
    torch.library.opcheck(library.integer_linear, (x, tensors, name, a.bias))
    pair = (x, tensors, list(b.packed.tensors), name, None, None, 0.5, 0.6, 0.0, 0.0, None, None)
    torch.library.opcheck(library.sparse_gated_linear, (*pair, "silu"))


@each_format
@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows(bits: int, kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(11)
    layer = random_layer(generator, bits, 96, 97, 32, kind)
    x = random_input(generator, 20, 96, dtype)
    wanted = x.double() @ layer.weight.t() + layer.bias.double()
    tensors, name = layer.packed.tensors, layer.packed.format
    assert_close(launch.integer_linear(x, tensors, name, layer.bias), wanted)
    assert_close(reference.integer_linear(x, tensors, name, layer.bias), wanted)


@pytest.mark.timeout(300)
def test_many_rows_compile_as_one_graph() -> None:
    generator = torch.Generator().manual_seed(17)
    layer = random_layer(generator, 4, 96, 97, 32)
    x = random_input(generator, 20, 96, torch.float32)

    def run(x: Tensor) -> Tensor:
        return find_format("int4").multiply(x, layer.packed.tensors, layer.bias) + 1.0

    compiled = torch.compile(run, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    with torch.no_grad():
        assert_close(compiled(x), x.double() @ layer.weight.t() + layer.bias.double() + 1.0)


def test_layers_over_one_input_are_stored_alike() -> None:
    generator = torch.Generator().manual_seed(12)
    x = random_input(generator, 1, 64, torch.float16)
    layer = random_layer(generator, 4, 64, 32, 32)
    others = [
        random_layer(generator, 4, 64, 32, 16),
        random_layer(generator, 4, 64, 32, 32, "zero points"),
        random_layer(generator, 4, 64, 32, 32, scale_dtype=torch.float32),
    ]
    for other in others:
        with pytest.raises(ValueError, match="must be stored alike, in types, groups and zero points; got int4"):
            launch.sparse_linear_group(*group_arguments(x, [layer, other]))
    with pytest.raises(ValueError, match="weight of 64 input channels, input of 32"):
        linear(launch, x[:, :32], layer)


@each_format
def test_kernels_of_one_format_do_not_serve_another(bits: int) -> None:
    """In one process, over the same input."""
    generator = torch.Generator().manual_seed(13)
    x = random_input(generator, 1, 64, torch.float32)
    for kind in KINDS:
        layer = random_layer(generator, bits, 64, 128, 32, kind)
        dense = find_format("dense").pack(find_format(layer.packed.format).dequantize(layer.packed.tensors))
        assert_close(linear(launch, x, layer), expected(x, layer))
        y = launch.sparse_linear(x, dense.tensors, "dense", layer.bias, layer.threshold, 0.0, None)
        assert_close(y, expected(x, layer))


def test_tuned_configurations_have_names_of_their_own() -> None:
    assert shape_key(4096, (11008,), 16) == "4096x11008x16bit"
    assert shape_key(4096, (11008,), 4, "int4", 128) == "4096x11008x4bit-int4-g128"


@each_format
@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("out_features", [(1,), (1024,), (11008, 11008), (128256,)])
@pytest.mark.parametrize("in_features", [128, 4096, 28672])
def test_rule_of_thumb_fits_any_shape(
    bits: int, group_size: int | None, out_features: tuple[int, ...], in_features: int
) -> None:
    for rows in (1, 3, 8):
        chosen = rule_of_thumb("sm90x132", rows, in_features, out_features, bits, group_size or in_features)
        assert 1 <= chosen.slices <= in_features
        assert rows * chosen.lane_bytes * 8 // bits <= 64 and chosen.lane_bytes in (4, 8, 16)
        channels = in_features / chosen.slices
        if group_size == 128:  # no slice has channels of two groups
            assert channels == int(channels) and 128 % channels == 0


@needs_gpu
@each_format
@each_kind
def test_graph_replays_with_changing_sparsity(bits: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(14)
    run, wanted = feed_forward(generator, bits, 512, 1408, 128)
    x = random_input(generator, 1, 512, torch.float16)
    run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x)
    for scale in (1.0, 0.01, 30.0, 0.0, 0.7):
        x.copy_(scale * random_input(generator, 1, 512, torch.float16))
        y.fill_(torch.nan)
        graph.replay()
        assert_close(y, wanted(x))


@needs_gpu
def test_streams_share_nothing() -> None:
    generator = torch.Generator().manual_seed(15)
    run, wanted = feed_forward(generator, 4, 1024, 2816, 128)
    problems = []
    for _ in range(8):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        x = random_input(generator, 1, 1024, torch.float16)
        with torch.cuda.stream(stream):
            run(x)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            y = [run(x) for _ in range(20)]
        problems.append((stream, graph, x, y))
    torch.cuda.synchronize()
    for _ in range(10):
        for stream, graph, _, _ in problems:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for _, _, x, results in problems:
        assert_close(results[0], wanted(x))
        assert all(torch.equal(results[0], result) for result in results)


@needs_gpu
def test_more_than_two_to_the_31_words() -> None:
    in_features, out_features = 70_000, 128 * 2048
    words = torch.full((in_features, out_features // 8), -0x77777778, dtype=torch.int32, device=DEVICE)  # all 8: zero
    channels = torch.tensor([0, 65_535, 65_537, in_features - 1], device=DEVICE)
    words[channels] = -0x66666667  # all 9: one
    scales = torch.ones(1, out_features, dtype=torch.float16, device=DEVICE)
    weights = Weights("int4", (words, scales, torch.empty((0, 0), dtype=torch.uint8, device=DEVICE)))
    x = torch.zeros(1, in_features, dtype=torch.float16, device=DEVICE)
    x[0, channels] = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float16, device=DEVICE)
    x[0, 17] = 0.25
    for rows in (1, 2):
        y = kernels.sparse_linear(x.expand(rows, -1), weights, threshold=0.5)
        assert torch.equal(y, torch.full_like(y, 1111.0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_its_input_is() -> None:
    generator = torch.Generator().manual_seed(16)
    layer = random_layer(generator, 4, 64, 80, 32)
    x = random_input(generator, 1, 64, torch.float16)
    there = Weights(layer.packed.format, tuple(tensor.to("cuda:1") for tensor in layer.packed.tensors))
    y = kernels.sparse_linear(x.to("cuda:1"), there, threshold=layer.threshold)
    assert y.device.index == 1
    assert_close(y.to("cuda:0"), expected(x, layer))
    many = find_format("int4").multiply(x.to("cuda:1").expand(20, -1), there.tensors)
    assert many.device.index == 1
