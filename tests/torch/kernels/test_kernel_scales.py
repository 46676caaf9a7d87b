"""A scale per input channel in the criterion: the kernels against float64, and what they keep against the twin."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_problems import DEVICE, DTYPES, Layer, assert_close, expected, random_input, random_layer

from optimum_scap.torch import kernels
from optimum_scap.torch.kernels import reference
from optimum_scap.torch.kernels.configurations import LaunchConfiguration


pytest.importorskip("triton")
from optimum_scap.torch.kernels import launch  # noqa: E402


CONFIGURATIONS = (None, LaunchConfiguration(num_warps=1, unroll=4, slices=3, sum_block=32))
IMPLEMENTATIONS = {"triton": launch, "reference": reference}


def random_scale(generator: torch.Generator, in_features: int) -> torch.Tensor:
    return (2.0 * torch.rand(in_features, generator=generator)).to(DEVICE)


def kept_values(implementation, x: torch.Tensor, layer: Layer, *configuration: LaunchConfiguration) -> torch.Tensor:
    """Which values of x [rows, in_features] are kept and not zero, as the product with the identity tells."""
    identity = torch.eye(x.shape[1], device=DEVICE).t()
    y = implementation.sparse_linear(
        x, [identity], "dense", None, layer.threshold, layer.mode, layer.scale, *configuration
    )
    return y != 0.0


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    in_features=st.integers(1, 90),
    out_features=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    scaled=st.lists(st.booleans(), min_size=4, max_size=4),
    rows=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
    modes=st.lists(st.sampled_from([0.0, 0.25, -0.5]), min_size=4, max_size=4),
    specials=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 89), st.sampled_from([torch.nan, torch.inf, 0.0]))),
    configuration=st.sampled_from(CONFIGURATIONS),
    seed=st.integers(0, 999),
)
def test_branches_of_which_some_have_a_scale(
    in_features, out_features, scaled, rows, dtype, modes, specials, configuration, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = random_input(generator, rows, in_features, dtype)
    for row, channel, value in specials:
        x[row % rows, channel % in_features] = value
    layers = []
    for features, with_scale, mode in zip(out_features, scaled, modes, strict=False):
        layer = random_layer(generator, in_features, features, dtype, mode=mode)
        if with_scale:
            layer.scale = random_scale(generator, in_features)
            # The criterion of one value is exactly the threshold.
            distances = layer.scale * (x.float() - mode).abs()
            layer.threshold = float(distances[seed % rows, seed % in_features])
            layer.threshold = layer.threshold if layer.threshold < torch.inf else 0.7
        layers.append(layer)
    outputs = launch.sparse_linear_group(
        x,
        [layer.weight for layer in layers],
        "dense",
        [layer.bias for layer in layers],
        [layer.threshold for layer in layers],
        [layer.mode for layer in layers],
        [layer.scale for layer in layers],
        configuration,
    )
    for y, layer in zip(outputs, layers, strict=True):
        assert_close(y, expected(x, layer))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    values=st.lists(st.floats(width=32, allow_infinity=False, allow_nan=False), min_size=1, max_size=40),
    scale_value=st.floats(0.0, 2.0**60, width=32),
    rows=st.integers(1, 3),
    mode=st.sampled_from([0.0, 0.1]),
    configuration=st.sampled_from(CONFIGURATIONS),
)
def test_thresholds_that_are_the_criterion_of_a_value(values, scale_value, rows, mode, configuration) -> None:
    """One product, rounded once: what stands exactly on the threshold is pruned, by the kernel as by the twin."""
    # Small enough that a product with a weight of one is neither rounded nor infinite.
    x = torch.tensor([values] * rows, device=DEVICE).clamp(-(2.0**60), 2.0**60)
    scale = torch.full((x.shape[1],), scale_value, device=DEVICE)
    mode = float(torch.tensor(mode))
    layer = Layer(torch.empty(0), None, 0.0, mode, scale)
    for threshold in {float(scale[0] * (value - mode).abs()) for value in x[0, :3]}:
        layer.threshold = threshold
        mine, twin = (kept_values(kernels, x, layer) for kernels in IMPLEMENTATIONS.values())
        centered = x - mode
        assert torch.equal(mine, twin)
        assert torch.equal(mine, (scale * centered.abs() > threshold) & (centered != 0.0))
        assert torch.equal(mine, kept_values(launch, x, layer, configuration))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [1, 2])
def test_not_a_number_is_kept(implementation, rows: int) -> None:
    x = torch.full((rows, 6), 0.5, device=DEVICE)
    x[0, 2] = torch.nan
    scale = torch.tensor([1.0, 0.0, 1.0, torch.nan, torch.inf, 0.5], device=DEVICE)
    weight = torch.eye(6, device=DEVICE)[torch.tensor([3, 4, 5, 0, 1], device=DEVICE)].t().contiguous().t()
    y = implementation.sparse_linear(x[-1:], [weight], "dense", None, 0.5, 0.0, scale)
    assert rows == 1 or y.tolist() == [[0.5, 0.5, 0.0, 0.0, 0.0]]
    y = implementation.sparse_linear(x, [weight], "dense", None, 0.5, 0.0, scale)
    assert torch.isnan(y[0]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("scaled", [(True, False), (False, True), (True, True)])
def test_gated_layers_have_scales_of_their_own(implementation, scaled: tuple[bool, bool]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = random_input(generator, 2, 50, torch.float32)
    gate = random_layer(generator, 50, 41, torch.float32, threshold=0.4, mode=0.25)
    up = random_layer(generator, 50, 41, torch.float32, threshold=0.8)
    gate.scale, up.scale = (random_scale(generator, 50) if there else None for there in scaled)
    y = implementation.sparse_gated_linear(
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
        "silu",
    )
    assert_close(y, reference.ACTIVATIONS["silu"](expected(x, gate)) * expected(x, up))


def test_public_functions_take_scales() -> None:
    generator = torch.Generator().manual_seed(1)
    x = random_input(generator, 1, 48, torch.float32)
    gate, up = (random_layer(generator, 48, 64, torch.float32, threshold=0.4) for _ in range(2))
    down = random_layer(generator, 64, 48, torch.float32, threshold=0.1)
    for layer in (gate, up, down):
        layer.scale = random_scale(generator, layer.weight.shape[1])
    assert_close(kernels.sparse_linear(x, up.weight, up.bias, threshold=0.4, scale=up.scale), expected(x, up))
    outputs = kernels.sparse_linear_group(
        x,
        [gate.weight, up.weight],
        [gate.bias, up.bias],
        thresholds=[0.4, 0.4],
        modes=[0.0, 0.0],
        scales=[None, up.scale],
    )
    assert_close(outputs[1], expected(x, up))
    y = kernels.sparse_feed_forward(
        x,
        gate.weight,
        up.weight,
        down.weight,
        gate.bias,
        up.bias,
        down.bias,
        gate_threshold=gate.threshold,
        up_threshold=up.threshold,
        down_threshold=down.threshold,
        gate_scale=gate.scale,
        up_scale=up.scale,
        down_scale=down.scale,
    )
    hidden = reference.ACTIVATIONS["silu"](expected(x, gate)) * expected(x, up)
    assert_close(y, expected(hidden.float(), down))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_what_is_no_scale_is_refused(implementation) -> None:
    x, weight = torch.zeros(1, 4, device=DEVICE), torch.zeros(4, 6, device=DEVICE).t()
    ones = torch.ones(8, device=DEVICE)
    for wrong in (ones, ones[:3], ones[:4].half(), ones[:4].double(), ones[::2], ones[:4].view(1, 4)):
        with pytest.raises(ValueError, match="a scale must be contiguous float32 of shape \\(4,\\); got torch"):
            implementation.sparse_linear(x, [weight], "dense", None, 0.0, 0.0, wrong)
    with pytest.raises(ValueError, match="scale on meta, input on"):
        implementation.sparse_linear(x, [weight], "dense", None, 0.0, 0.0, torch.ones(4, device="meta"))
