"""A format takes one class and one function: the kernels run through one that this file adds to them."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimum_scap.torch import kernels
from optimum_scap.torch.kernels import library, reference
from optimum_scap.torch.weights import KernelArguments, WeightFormat, Weights, base, find_format, register


triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from optimum_scap.torch.kernels import launch  # noqa: E402
from optimum_scap.torch.kernels.configurations import LaunchConfiguration  # noqa: E402
from optimum_scap.torch.kernels.load import LOAD_FUNCTIONS, hold, loads, read  # noqa: E402


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAME = "test-int8"


class Int8Format(WeightFormat):
    """Integers `[out_features, in_features]`, one input channel after the other, and a scale per output channel."""

    name = NAME
    tensor_count = 2

    def pack(self, *stored: Tensor) -> Weights:
        if len(stored) == 1:
            scale = stored[0].float().abs().amax(dim=1) / 127
            stored = (torch.round(stored[0].float() / scale[:, None]).to(torch.int8), scale)
        return Weights(self.name, (stored[0].t().contiguous().t(), stored[1].float()))

    def shape(self, tensors: Sequence[Tensor]) -> tuple[int, int]:
        return tensors[0].shape[0], tensors[0].shape[1]

    def dequantize(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].float() * tensors[1][:, None]

    def kernel_arguments(self, tensors: Sequence[Tensor], input_major: bool) -> KernelArguments:
        return KernelArguments(tuple(tensors), (tensors[0].stride(1),))


@triton.jit
def load_int8(
    tensors,
    strides,
    first,
    channels,
    words,
    word_mask,
    channel_mask,
    zero,
    HOLD: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    integers = ()
    for step in tl.static_range(len(channels)):
        pointers = tensors[0] + (channels[step].to(tl.int64) + first) * strides[0] + words
        integers += (read(pointers, word_mask, channel_mask),)
    integers = hold(integers, zero, HOLD)
    scales = read(tensors[1] + words, word_mask, None)
    weights = ()
    for step in tl.static_range(len(channels)):
        weights += (integers[step].to(tl.float32) * scales,)
    return weights


@pytest.fixture(autouse=True, scope="module")
def format_is_known() -> Iterator[None]:
    register(Int8Format())
    loads(NAME)(load_int8)
    yield
    del base._formats[NAME], LOAD_FUNCTIONS[NAME]


def random_weights(generator: torch.Generator, in_features: int, *out_features: int) -> list[Weights]:
    made = [torch.randn(features, in_features, generator=generator) / in_features**0.5 for features in out_features]
    return [find_format(NAME).pack(weight.to(DEVICE)) for weight in made]


def tensors_of(layers: Sequence[Weights]) -> list[Tensor]:
    return [tensor for layer in layers for tensor in layer.tensors]


def assert_close(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for y, twin in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(y, twin, rtol=2e-3, atol=2e-3 if y.dtype == torch.float16 else 1e-5)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    in_features=st.integers(1, 90),
    out_features=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    rows=st.sampled_from([1, 1, 2, 8]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    mode=st.sampled_from([0.0, 0.25]),
    configuration=st.sampled_from([None, LaunchConfiguration(num_warps=1, unroll=4, slices=3, sum_block=32)]),
    seed=st.integers(0, 99),
)
def test_sparse_kernels_agree_with_their_twin(in_features, out_features, rows, dtype, mode, configuration, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = tensors_of(random_weights(generator, in_features, *out_features))
    x = torch.randn(rows, in_features, generator=generator).to(DEVICE, dtype)
    count = len(out_features)
    biases = [torch.randn(features, generator=generator).to(DEVICE) for features in out_features]
    scales = [torch.rand(in_features, generator=generator).to(DEVICE), None, None, None][:count]
    arguments = (x, weights, NAME, biases, count * [0.5], count * [mode], scales)
    assert_close(launch.sparse_linear_group(*arguments, configuration), reference.sparse_linear_group(*arguments))


def test_gated_and_dense_kernels_agree_with_their_twins() -> None:
    generator = torch.Generator().manual_seed(1)
    gate, up = random_weights(generator, 70, 140, 140)
    x = torch.randn(2, 70, generator=generator).to(DEVICE)
    arguments = (x, gate.tensors, up.tensors, NAME, None, None, 0.4, 0.6, 0.25, 0.0, None, None, "silu")
    assert_close([launch.sparse_gated_linear(*arguments)], [reference.sparse_gated_linear(*arguments)])
    dense = (x[:1], tensors_of([gate, up]), NAME, [None, None])
    assert_close(launch.linear_group(*dense), reference.linear_group(*dense))


def test_operations_take_weights_of_the_format() -> None:
    generator = torch.Generator().manual_seed(2)
    gate, up = random_weights(generator, 64, 96, 96)
    (down,) = random_weights(generator, 96, 64)
    x = torch.randn(1, 64, generator=generator).to(DEVICE)

    def run(x: Tensor) -> Tensor:
        return kernels.sparse_feed_forward(
            x, gate, up, down, gate_threshold=0.5, up_threshold=0.5, down_threshold=0.2, down_mode=0.125
        )

    hidden = reference.sparse_gated_linear(
        x, gate.tensors, up.tensors, NAME, None, None, 0.5, 0.5, 0.0, 0.0, None, None, "silu"
    )
    wanted = reference.sparse_linear(hidden, down.tensors, NAME, None, 0.2, 0.125, None)
    compiled = torch.compile(run, fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "aot_eager")
    with torch.no_grad():
        assert_close([run(x), compiled(x)], [wanted, wanted])
    torch.library.opcheck(library.sparse_linear, (x, list(gate.tensors), NAME, None, 0.5, 0.0, None))
    sparse = kernels.sparse_linear_group(x, [gate, up], [None, None], thresholds=[0.5, 0.6], modes=[0.0, 0.0])
    assert_close(sparse[1:], [kernels.sparse_linear(x, up, threshold=0.6)])


def test_kernels_of_the_format_are_not_those_of_another() -> None:
    """In one process, over the same input: what is compiled for one format must not serve another."""
    generator = torch.Generator().manual_seed(3)
    (weights,) = random_weights(generator, 64, 128)
    x = torch.randn(1, 64, generator=generator).to(DEVICE)
    dense = find_format("dense").pack(find_format(NAME).dequantize(weights.tensors))
    outputs = [
        launch.sparse_linear(x, layer.tensors, layer.format, None, 0.5, 0.0, None) for layer in (weights, dense)
    ]
    assert_close(outputs[:1], outputs[1:])


def test_tuned_configurations_of_the_format_have_names_of_their_own() -> None:
    from optimum_scap.torch.kernels.configurations import shape_key

    assert shape_key(4096, (11008,), 16) == "4096x11008x16bit"
    assert shape_key(4096, (11008,), 8, NAME) == "4096x11008x8bit-test-int8"
