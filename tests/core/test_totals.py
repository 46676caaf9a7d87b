"""The sparsity of several layers together."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_calibration import LINE, Numbers

from optimum_scap import SCAPConfig, SCAPError, Target
from optimum_scap.core.calibration import Calibration
from optimum_scap.core.criterion import Criterion
from optimum_scap.core.sites import Layer, Layers, Site
from optimum_scap.core.statistics import ActivationStatistics
from optimum_scap.core.targets import Group
from optimum_scap.core.totals import at_total, group_weights, spread, weighted_total, with_sparsities


def statistics_of(values: Any) -> ActivationStatistics:
    found = ActivationStatistics("layer")
    found.add(np.asarray(values, dtype=np.float32))
    return found


def test_layers_count_by_their_weights() -> None:
    layers = Layers({"up": Layer("up", "up", 4, 8), "gate": Layer("gate", "gate", 4, 8), "o": Layer("o", "o", 4, 4)})
    groups = [
        Group(Site(("up", "gate")), ("up", "gate"), Target(sparsity=0.5)),
        Group(Site(("o",)), ("o",), Target(sparsity=0.1)),
    ]
    weights = group_weights(groups, layers)
    assert weights == {"up": 64, "o": 16}
    assert weighted_total({"up": 0.5, "o": 0.1}, weights) == pytest.approx(0.42)
    changed = with_sparsities(groups, {"up": 0.25, "o": 0.75})
    assert [(group.key, group.target.sparsity) for group in changed] == [("up", 0.25), ("o", 0.75)]


@given(st.lists(st.tuples(st.floats(0.01, 0.99), st.integers(1, 1000)), min_size=1, max_size=8), st.floats(0.02, 0.98))
def test_spreading_meets_the_total_and_keeps_the_order(given_: list[tuple[float, int]], total: float) -> None:
    sparsities = {str(key): value for key, (value, _) in enumerate(given_)}
    weights = {str(key): count for key, (_, count) in enumerate(given_)}
    found = spread(sparsities, weights, total)
    assert weighted_total(found, weights) == pytest.approx(total, abs=1e-6)
    assert sorted(found, key=lambda key: (sparsities[key], key)) == sorted(found, key=lambda key: (found[key], key))


def test_spreading_multiplies_the_odds() -> None:
    found = spread({"a": 0.5, "b": 0.2}, {"a": 1, "b": 1}, 0.5)
    assert found["a"] / (1 - found["a"]) == pytest.approx(4 * found["b"] / (1 - found["b"]))


def test_one_factor_on_all_thresholds_meets_the_total() -> None:
    values = np.linspace(0, 1, 1001)
    statistics = {"a": statistics_of(values), "b": statistics_of(2 * values)}
    criteria = {key: Criterion(np.float32(0.0), np.float32(0.2)) for key in statistics}
    # a prunes 20 %, b 10 %; the total over 1 and 3 weights is 12.5 %, so the factor is 4.
    found = at_total(statistics, criteria, {"a": 1, "b": 3}, 0.5)
    assert found == {"a": pytest.approx(0.8, abs=2e-3), "b": pytest.approx(0.4, abs=2e-3)}


def test_a_total_between_two_values_is_met_all_the_same() -> None:
    statistics = {"a": statistics_of([0.0] * 60 + [1.0] * 40)}
    criteria = {"a": Criterion(np.float32(0.0), np.float32(0.5))}
    assert at_total(statistics, criteria, {"a": 1}, 0.5) == {"a": pytest.approx(0.5)}


def test_a_total_moves_the_targets_of_the_published_method() -> None:
    model = Numbers(lambda number, count: {"0.up_proj": LINE, "0.down_proj": LINE}, [["0.up_proj"], ["0.down_proj"]])
    config = SCAPConfig(targets={"up": 0.5, "down": 0.2}, total=0.6)
    found = Calibration({"model": model}, config).run({"model": range(8)}, "numbers")
    up, down = (found.layers[name].target_sparsity for name in ("0.up_proj", "0.down_proj"))
    assert (up + down) / 2 == pytest.approx(0.6) and up > down
    assert found.layers["0.up_proj"].threshold == pytest.approx(up, abs=0.02)


def test_a_backend_that_cannot_learn_says_so_before_it_reads_anything() -> None:
    model = Numbers(lambda number, count: {"up_proj": LINE}, [["up_proj"]])
    with pytest.raises(SCAPError, match="learned by PyTorch models"):
        Calibration({"model": model}, SCAPConfig(targets={"up": 0.5}, learn=("biases",)))
    assert model.limits == []
