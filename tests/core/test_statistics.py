import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_scap import SCAPError
from optimum_scap.core.criterion import Criterion
from optimum_scap.core.statistics import ActivationStatistics, QuantileSketch, weighted_quantile


RNG = np.random.default_rng(7)
DISTRIBUTIONS = {
    "normal": RNG.standard_normal(2_000_000),
    "six orders of magnitude": 10 ** RNG.uniform(-3, 3, 2_000_000) * RNG.choice([-1, 1], 2_000_000),
    "few distinct values": RNG.integers(-3, 4, 1_000_000),
    "mostly zero": RNG.standard_normal(1_000_000) * (RNG.random(1_000_000) < 0.1),
    "constant": np.full(300_000, -2.5),
    "sorted": np.sort(RNG.standard_normal(1_000_000)),
    "smaller than the sketch": RNG.standard_normal(999),
}


def answer(statistics: ActivationStatistics, estimator: Any, sparsity: float) -> tuple[np.float32, np.float32]:
    criterion = statistics.solve(estimator, sparsity)
    return criterion.mode, criterion.threshold


def fed(values: np.ndarray, batches: int = 50) -> ActivationStatistics:
    statistics = ActivationStatistics("layer")
    for batch in np.array_split(values.astype(np.float32), batches):
        statistics.add(batch)
    return statistics


@pytest.mark.parametrize("mode", ["zero", "mean", "median", "kde"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_thresholds_realize_the_exact_sparsity_within_0_002(name: str, mode: str) -> None:
    values = DISTRIBUTIONS[name].astype(np.float32)
    statistics = fed(values)
    for sparsity in (0.05, 0.35, 0.5, 0.7, 0.9, 0.99):
        m, threshold = answer(statistics, mode, sparsity)
        assert m.dtype == threshold.dtype == np.float32
        residuals = np.abs(values - m)
        exact = np.quantile(residuals, sparsity, method="inverted_cdf")
        assert np.mean(residuals <= threshold) == pytest.approx(np.mean(residuals <= exact), abs=0.002)
        assert statistics.sparsity(Criterion(m, threshold)) == pytest.approx(
            np.mean(residuals <= threshold), abs=0.002
        )


def test_modes_against_numpy() -> None:
    values = (RNG.gamma(2.0, 1.0, 500_000) - 1.0).astype(np.float32)
    statistics = fed(values)
    assert statistics.solve("zero", 0.5).mode == 0
    assert statistics.solve("mean", 0.5).mode == pytest.approx(values.mean(dtype=np.float64), abs=1e-6)
    median = statistics.solve("median", 0.5).mode
    assert np.mean(values <= median) == pytest.approx(0.5, abs=0.002)
    assert statistics.solve("kde", 0.5).mode == pytest.approx(0.0, abs=0.1)  # the density of gamma(2) - 1 peaks at 0


def test_the_kde_finds_the_higher_of_two_peaks() -> None:
    values = np.concatenate([RNG.normal(-2, 0.3, 60_000), RNG.normal(3, 0.3, 40_000)])
    assert fed(values).solve("kde", 0.3).mode == pytest.approx(-2, abs=0.1)


def test_memory_does_not_grow_with_the_number_of_values() -> None:
    sketch = QuantileSketch()
    batch = RNG.standard_normal(200_000).astype(np.float32)
    sizes = []
    tracemalloc.start()
    try:
        for _ in range(300):
            sketch.add(batch)
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert sketch.count == 60_000_000
    assert max(sizes) < 2**20


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_the_layer(bad: float) -> None:
    statistics = ActivationStatistics("model.layers.3.mlp.up_proj")
    with pytest.raises(SCAPError, match=r"model\.layers\.3\.mlp\.up_proj.*NaN or infinite"):
        statistics.add(np.array([1.0, bad, 2.0], dtype=np.float32))


def test_all_zero_input_names_the_layer() -> None:
    statistics = ActivationStatistics("fc1")
    statistics.add(np.zeros((4, 8), dtype=np.float32))
    with pytest.raises(SCAPError, match="layer fc1: all of its input activations are zero"):
        statistics.solve("zero", 0.5)


def test_a_layer_that_was_never_reached_is_named() -> None:
    with pytest.raises(SCAPError, match="layer fc1: no activations were seen"):
        ActivationStatistics("fc1").solve("zero", 0.5)


def test_weighted_quantile_is_the_smallest_value_that_holds_the_fraction() -> None:
    values = np.array([3, 1, 2], dtype=np.float32)
    weights = np.array([1.0, 1.0, 2.0])
    assert [weighted_quantile(values, weights, q) for q in (0.1, 0.25, 0.26, 0.75, 0.76, 1.0)] == [1, 1, 2, 2, 3, 3]


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=500),
    sparsity=st.floats(0.0, 0.99),
    batches=st.integers(1, 5),
)
def test_what_fits_into_the_sketch_is_exact(values: list[float], sparsity: float, batches: int) -> None:
    array = np.array(values, dtype=np.float32)
    if not array.any():
        return
    _, threshold = answer(fed(array, batches), "zero", sparsity)
    assert threshold == np.quantile(np.abs(array), sparsity, method="inverted_cdf")
