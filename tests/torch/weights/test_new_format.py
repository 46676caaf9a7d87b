"""A format takes one class and one function: the kernels run through those that `toy_formats` adds to them."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_scap.torch import kernels
from optimum_scap.torch.kernels import library, reference
from optimum_scap.torch.weights import Weights, base, find_format, register


pytest.importorskip("triton")
from toy_formats import Int4Format, Int8Format, load_int4, load_int8  # noqa: E402

from optimum_scap.torch.kernels import launch  # noqa: E402
from optimum_scap.torch.kernels.configurations import LaunchConfiguration  # noqa: E402
from optimum_scap.torch.kernels.load import LOAD_FUNCTIONS, loads  # noqa: E402


FORMATS = {Int8Format.name: load_int8, Int4Format.name: load_int4}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="module")
def formats_are_known() -> Iterator[None]:
    for weight_format in (Int8Format(), Int4Format()):
        register(weight_format)
        loads(weight_format.name)(FORMATS[weight_format.name])
    yield
    for name in FORMATS:
        del base._formats[name], LOAD_FUNCTIONS[name]


each_format = pytest.mark.parametrize("name", FORMATS)


def random_weights(generator: torch.Generator, name: str, in_features: int, *out_features: int) -> list[Weights]:
    made = [torch.randn(features, in_features, generator=generator) / in_features**0.5 for features in out_features]
    return [find_format(name).pack(weight.to(DEVICE)) for weight in made]


def tensors_of(layers: Sequence[Weights]) -> list[Tensor]:
    return [tensor for layer in layers for tensor in layer.tensors]


def assert_close(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for y, twin in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(y, twin, rtol=2e-3, atol=2e-3 if y.dtype == torch.float16 else 1e-5)


@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(FORMATS)),
    in_features=st.integers(1, 90),
    out_features=st.lists(st.integers(1, 150).map(lambda half: 2 * half), min_size=1, max_size=4),
    rows=st.sampled_from([1, 1, 2, 8]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    mode=st.sampled_from([0.0, 0.25]),
    configuration=st.sampled_from([None, LaunchConfiguration(num_warps=1, unroll=4, slices=3, sum_block=32)]),
    seed=st.integers(0, 99),
)
def test_sparse_kernels_agree_with_their_twin(name, in_features, out_features, rows, dtype, mode, configuration, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = tensors_of(random_weights(generator, name, in_features, *out_features))
    x = torch.randn(rows, in_features, generator=generator).to(DEVICE, dtype)
    count = len(out_features)
    biases = [torch.randn(features, generator=generator).to(DEVICE) for features in out_features]
    scales = [torch.rand(in_features, generator=generator).to(DEVICE), None, None, None][:count]
    arguments = (x, weights, name, biases, count * [0.5], count * [mode], scales)
    assert_close(launch.sparse_linear_group(*arguments, configuration), reference.sparse_linear_group(*arguments))


@each_format
def test_gated_and_dense_kernels_agree_with_their_twins(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    gate, up = random_weights(generator, name, 70, 140, 140)
    x = torch.randn(2, 70, generator=generator).to(DEVICE)
    arguments = (x, gate.tensors, up.tensors, name, None, None, 0.4, 0.6, 0.25, 0.0, None, None, "silu")
    assert_close([launch.sparse_gated_linear(*arguments)], [reference.sparse_gated_linear(*arguments)])
    dense = (x[:1], tensors_of([gate, up]), name, [None, None])
    assert_close(launch.linear_group(*dense), reference.linear_group(*dense))


@each_format
def test_operations_take_weights_of_the_format(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    gate, up = random_weights(generator, name, 64, 96, 96)
    (down,) = random_weights(generator, name, 96, 64)
    x = torch.randn(1, 64, generator=generator).to(DEVICE)

    def run(x: Tensor) -> Tensor:
        return kernels.sparse_feed_forward(
            x, gate, up, down, gate_threshold=0.5, up_threshold=0.5, down_threshold=0.2, down_mode=0.125
        )

    hidden = reference.sparse_gated_linear(
        x, gate.tensors, up.tensors, name, None, None, 0.5, 0.5, 0.0, 0.0, None, None, "silu"
    )
    wanted = reference.sparse_linear(hidden, down.tensors, name, None, 0.2, 0.125, None)
    compiled = torch.compile(run, fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "aot_eager")
    with torch.no_grad():
        assert_close([run(x), compiled(x)], [wanted, wanted])
    torch.library.opcheck(library.sparse_linear, (x, list(gate.tensors), name, None, 0.5, 0.0, None))
    sparse = kernels.sparse_linear_group(x, [gate, up], [None, None], thresholds=[0.5, 0.6], modes=[0.0, 0.0])
    assert_close(sparse[1:], [kernels.sparse_linear(x, up, threshold=0.6)])


@each_format
def test_kernels_of_the_format_are_not_those_of_another(name: str) -> None:
    """In one process, over the same input: what is compiled for one format must not serve another."""
    generator = torch.Generator().manual_seed(3)
    (weights,) = random_weights(generator, name, 64, 128)
    x = torch.randn(1, 64, generator=generator).to(DEVICE)
    dense = find_format("dense").pack(find_format(name).dequantize(weights.tensors))
    outputs = [
        launch.sparse_linear(x, layer.tensors, layer.format, None, 0.5, 0.0, None) for layer in (weights, dense)
    ]
    assert_close(outputs[:1], outputs[1:])


def test_tuned_configurations_of_the_format_have_names_of_their_own() -> None:
    from optimum_scap.torch.kernels.configurations import shape_key

    assert shape_key(4096, (11008,), 16) == "4096x11008x16bit"
    assert shape_key(4096, (11008,), 8, "toy-int8") == "4096x11008x8bit-toy-int8"
