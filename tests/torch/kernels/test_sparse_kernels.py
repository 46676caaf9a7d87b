"""What the kernels compute, against float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_problems import DEVICE, DTYPES, Layer, assert_close, expected, random_input, random_layer

from optimum_scap.torch.kernels import reference
from optimum_scap.torch.kernels.configurations import DenseConfiguration, LaunchConfiguration


pytest.importorskip("triton")
from optimum_scap.torch.kernels import launch  # noqa: E402


ON_GPU = DEVICE.type == "cuda"
SMALL = LaunchConfiguration(num_warps=1, unroll=4, slices=3, sum_block=32)
CONFIGURATIONS = (
    SMALL,
    LaunchConfiguration(num_warps=2, unroll=8, slices=1, sum_block=64),
    LaunchConfiguration(num_warps=4, unroll=2, slices=7, sum_block=32),
    None,
)
DENSE_CONFIGURATIONS = (
    None,
    DenseConfiguration(num_warps=1, block_n=1, block_k=32),
    DenseConfiguration(num_warps=2, block_n=8, block_k=128),
    DenseConfiguration(num_warps=4, block_n=2, block_k=1024),
)
IMPLEMENTATIONS = {"triton": launch, "reference": reference}


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest):
    return IMPLEMENTATIONS[request.param]


def linear(kernels, x: torch.Tensor, layer: Layer, *configuration: LaunchConfiguration | None) -> torch.Tensor:
    return kernels.sparse_linear(
        x, [layer.weight], "dense", layer.bias, layer.threshold, layer.mode, layer.scale, *configuration
    )


@settings(
    max_examples=300 if ON_GPU else 60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    in_features=st.integers(1, 300 if ON_GPU else 90),
    out_features=st.integers(1, 1500 if ON_GPU else 300),
    rows=st.sampled_from([1, 1, 2, 3, 8]),
    dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from([0.0, 0.25]),
    threshold=st.sampled_from([-1.0, 0.0, 0.7, 1.5, 1e30]),
    padding=st.sampled_from([0, 1, 8]),
    with_bias=st.booleans(),
    configuration=st.sampled_from(CONFIGURATIONS),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    in_features, out_features, rows, dtype, mode, threshold, padding, with_bias, configuration, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = random_input(generator, rows, in_features, dtype)
    layer = random_layer(generator, in_features, out_features, dtype, threshold, mode, with_bias, padding)
    y = linear(launch, x, layer, configuration)
    assert y.dtype == dtype
    assert_close(y, expected(x, layer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", range(1, 9))
def test_every_row_gets_its_own_channels(kernels, rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = random_input(generator, rows, 40, dtype)
    x[rows // 2] = 0.01  # a row that is pruned entirely
    layer = random_layer(generator, 40, 70, dtype, mode=0.25)
    assert_close(linear(kernels, x, layer), expected(x, layer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [0.0, 0.375])
def test_values_at_the_threshold_are_pruned(kernels, dtype: torch.dtype, mode: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = random_input(generator, 2, 64, dtype)
    distances = (x[0].float() - mode).abs()
    layer = random_layer(generator, 64, 33, dtype, threshold=float(distances.sort().values[32]), mode=mode)
    assert_close(linear(kernels, x, layer), expected(x, layer))
    # The one at the threshold has weights that could not be missed.
    at_threshold = int(distances.argsort()[32])
    layer.weight[:, at_threshold] = 1000.0
    assert_close(linear(kernels, x[:1], layer), expected(x[:1], layer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_kept(kernels, dtype: torch.dtype, special: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = random_input(generator, 3, 50, dtype)
    x[1, 7] = special
    layer = random_layer(generator, 50, 40, dtype, threshold=1e30)
    y = linear(kernels, x, layer)
    assert_close(y, expected(x, layer))
    assert torch.isfinite(y[0]).all() and not torch.isfinite(y[1]).any() and torch.isfinite(y[2]).all()


def test_denormal_differences_count(kernels) -> None:
    tiny = 2.0**-140
    x = torch.tensor([[tiny, 2 * tiny, 3 * tiny, -3 * tiny]], device=DEVICE)
    weight = torch.full((4, 5), 2.0**120, device=DEVICE).t()
    weight[:, 1] = 2.0**100
    y = kernels.sparse_linear(x, [weight], "dense", None, 2 * tiny, 0.0, None)
    assert torch.equal(y, torch.zeros_like(y))  # the last two cancel, the first two are pruned
    y = kernels.sparse_linear(x, [weight], "dense", None, tiny, 0.0, None)
    assert torch.equal(y, torch.full_like(y, 2.0**-39))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_pruned_gives_the_bias_and_none_pruned_the_dense_product(kernels, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x = random_input(generator, 1, 60, dtype)
    layer = random_layer(generator, 60, 45, dtype, threshold=100.0)
    assert_close(linear(kernels, x, layer)[0], layer.bias)
    layer.threshold = -1.0
    assert_close(linear(kernels, x, layer), x.double() @ layer.weight.double().t() + layer.bias.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_layers_of_a_group_have_thresholds_modes_and_sizes_of_their_own(
    kernels, dtype: torch.dtype, rows: int, count: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    x = random_input(generator, rows, 70, dtype)
    layers = [
        random_layer(generator, 70, 130, dtype, threshold=0.4, mode=0.25),
        random_layer(generator, 70, 61, dtype, threshold=1.1, with_bias=False, padding=3),
        random_layer(generator, 70, 300, dtype, threshold=0.8),
        random_layer(generator, 70, 1, dtype, threshold=0.1, with_bias=False, mode=-0.5),
        random_layer(generator, 70, 3, dtype, threshold=100.0),
        random_layer(generator, 70, 257, dtype, threshold=-1.0, mode=0.125),
        random_layer(generator, 70, 32, dtype, threshold=0.7),
    ][:count]
    layers[0].bias = layers[0].bias.to(dtype)
    outputs = kernels.sparse_linear_group(
        x,
        [layer.weight for layer in layers],
        "dense",
        [layer.bias for layer in layers],
        [layer.threshold for layer in layers],
        [layer.mode for layer in layers],
        [layer.scale for layer in layers],
    )
    for y, layer in zip(outputs, layers, strict=True):
        assert y.dtype == dtype and y.is_contiguous()
        assert_close(y, expected(x, layer))


@settings(
    max_examples=200 if ON_GPU else 20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    in_features=st.integers(1, 600),
    out_features=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    padding=st.integers(0, 3),
    configuration=st.sampled_from(DENSE_CONFIGURATIONS),
    seed=st.integers(0, 99),
)
def test_dense_group_is_right_for_every_shape(
    in_features: int,
    out_features: list[int],
    dtype: torch.dtype,
    padding: int,
    configuration: DenseConfiguration | None,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = random_input(generator, 1, in_features, dtype)
    layers = [dense_layer(generator, in_features, features, dtype, padding) for features in out_features]
    weights, biases = zip(*layers, strict=True)
    outputs = launch.linear_group(x, weights, "dense", biases, configuration)
    for y, (weight, bias) in zip(outputs, layers, strict=True):
        assert y.dtype == dtype
        product = x.double() @ weight.double().t()
        assert_close(y, product if bias is None else product + bias.double())


def dense_layer(
    generator: torch.Generator, in_features: int, out_features: int, dtype: torch.dtype, padding: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights that lie as nn.Linear has them, NaN beside them, and a bias or none."""
    stored = torch.full((out_features, in_features + padding), torch.nan)
    stored[:, :in_features] = torch.randn(out_features, in_features, generator=generator) / in_features**0.5
    bias = torch.randn(out_features, generator=generator).to(DEVICE, dtype) if out_features % 2 else None
    return stored.to(DEVICE, dtype)[:, :in_features], bias


def test_dense_group_refuses_wrong_arguments() -> None:
    x, weight = torch.zeros(1, 4, device=DEVICE), torch.zeros(6, 4, device=DEVICE)
    assert launch.linear_group(x[0], [weight], "dense", [None])[0].shape == (6,)
    assert launch.linear_group(x[None], [weight], "dense", [None])[0].shape == (1, 1, 6)
    with pytest.raises(ValueError, match="takes one row, got an input of shape \\(2, 4\\)"):
        launch.linear_group(x.expand(2, 4), [weight], "dense", [None])
    with pytest.raises(ValueError, match="output-channel-major"):
        launch.linear_group(x, [torch.zeros(4, 6, device=DEVICE).t()], "dense", [None])
    with pytest.raises(ValueError, match="3 input channels, input of 4"):
        launch.linear_group(x, [weight, weight[:, :3]], "dense", [None, None])


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_linear(kernels, dtype: torch.dtype, activation: str) -> None:
    generator = torch.Generator().manual_seed(4)
    x = random_input(generator, 2, 50, dtype)
    gate = random_layer(generator, 50, 41, dtype, threshold=0.4, mode=0.25)
    up = random_layer(generator, 50, 41, dtype, threshold=0.8, with_bias=False)
    y = kernels.sparse_gated_linear(
        x,
        [gate.weight],
        [up.weight],
        "dense",
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


def test_longer_slices_than_one_pass_of_the_list(kernels) -> None:
    generator = torch.Generator().manual_seed(5)
    x = random_input(generator, 1, 16 * 32 + 77, torch.float32)
    layer = random_layer(generator, x.shape[1], 20, torch.float32, threshold=1.6)
    if kernels is launch:
        one_slice = LaunchConfiguration(num_warps=1, unroll=8, slices=1, sum_block=32)
        y = linear(kernels, x, layer, one_slice)
    else:
        y = linear(kernels, x, layer)
    assert_close(y, expected(x, layer))


def test_inputs_of_any_shape_and_stride(kernels) -> None:
    generator = torch.Generator().manual_seed(6)
    layer = random_layer(generator, 24, 16, torch.float32)
    x = random_input(generator, 12, 48, torch.float32)[:, ::2].reshape(2, 6, 24)[:, :3]
    y = linear(kernels, x, layer)
    assert_close(y, expected(x, layer))
    assert linear(kernels, x[:0], layer).shape == (0, 3, 16)
    assert linear(kernels, x[0, 0], layer).shape == (16,)


def test_repeated_runs_agree_bit_by_bit_and_write_every_element() -> None:
    generator = torch.Generator().manual_seed(7)
    x = random_input(generator, 2, 100, torch.float16)
    layer = random_layer(generator, 100, 300, torch.float16)
    first = linear(launch, x, layer, SMALL)
    for _ in range(20 if ON_GPU else 2):
        # What the allocator hands out next is full of NaN.
        poison = [torch.full((size,), torch.nan, device=DEVICE) for size in (2 * 300, 3 * 2 * 300, 4096)]
        del poison
        again = linear(launch, x, layer, SMALL)
        assert torch.equal(first, again)


def test_wrong_arguments_are_refused() -> None:
    weight = torch.zeros(6, 4, device=DEVICE)
    x = torch.zeros(1, 4, device=DEVICE)
    with pytest.raises(ValueError, match="input-channel-major"):
        launch.sparse_linear(x, [weight], "dense", None, 0.0, 0.0, None)
    with pytest.raises(ValueError, match="4 input channels, input of 5"):
        launch.sparse_linear(torch.zeros(1, 5, device=DEVICE), [weight], "dense", None, 0.0, 0.0, None)
    with pytest.raises(ValueError, match="up to 8 rows, got 9"):
        launch.sparse_linear(
            torch.zeros(3, 3, 4, device=DEVICE), [weight.t().contiguous().t()], "dense", None, 0.0, 0.0, None
        )
