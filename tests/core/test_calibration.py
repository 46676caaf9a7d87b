"""The algorithm, on a backend made of numbers."""

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from optimum_scap import SCAPConfig, SCAPError, Target
from optimum_scap.core.backend import Backend, Collector, Counter, Visit, measure_sparsity
from optimum_scap.core.calibration import Calibration, calibrate
from optimum_scap.core.criterion import Criterion
from optimum_scap.core.roles import find_role
from optimum_scap.core.sites import Layer, Layers, Site
from optimum_scap.core.targets import Group, select_targets


TARGET = Target(sparsity=0.5)
TEXT = [f"model.language_model.layers.{i}.mlp.up_proj" for i in range(3)]
VISION = [f"model.vision_tower.vision_model.encoder.layers.{i}.mlp.fc1" for i in range(3)]
LINE = np.linspace(-1, 1, 101, dtype=np.float32)


class Numbers(Backend):
    """A model whose pass number i over so many samples shows the groups what `shown` says."""

    def __init__(self, shown: Callable[[int, int], Mapping[str, Any]], sites: Sequence[Sequence[str]] = ()) -> None:
        self.shown = shown
        self.sites = sites
        self.limits: list[int] = []
        self.criteria: list[Mapping[str, Criterion]] = []
        self.applied: Any = None

    def layers(self) -> Layers:
        return Layers({path: Layer(path, find_role(path), 4, 8) for site in self.sites for path in site})

    def find_sites(self, layers: Layers, samples: Iterable[Any]) -> list[Site]:
        return [Site(tuple(site)) for site in self.sites]

    def channel_norms(self, paths: Sequence[str]) -> Any:
        return np.array([1.0, 1.0, 4.0, 2.0], dtype=np.float32)

    def collector(self, groups: Sequence[Group], scales: Mapping[str, Any]) -> Collector:
        return _Collector(self)

    def apply(self, parameters: Any) -> None:
        self.applied = parameters

    def counter(self) -> Counter | None:
        return None


class _Collector(Collector):
    def __init__(self, model: Numbers) -> None:
        self.model = model

    def set(self, criteria: Mapping[str, Criterion]) -> None:
        self.model.limits.append(0)
        self.model.criteria.append(criteria)

    def run(self, sample: Any, visit: Visit) -> None:
        self.model.limits[-1] += 1
        number = len(self.model.limits) - 1
        for key, activations in self.model.shown(number, self.model.limits[-1]).items():
            if key in self.model.criteria[-1]:
                visit(key, activations)


def reaching(*paths: str) -> Numbers:
    return Numbers(lambda number, count: dict.fromkeys(paths, LINE))


def groups(paths: Iterable[str]) -> list[Group]:
    return [Group(Site((path,)), (path,), TARGET) for path in paths]


def refusal(all_paths: list[str], reached: list[str]) -> str:
    with pytest.raises(SCAPError, match="no activations were seen, the calibration data never reached it") as caught:
        calibrate(reaching(*reached), groups(all_paths), range(8), 0)
    return str(caught.value)


def excluded(message: str, paths: list[str]) -> list[str]:
    """The layers that the flags in a message leave dense."""
    words = shlex.split(message.replace(";", " "))
    patterns = [value for flag, value in zip(words, words[1:], strict=False) if flag == "--scap-exclude"]
    assert patterns and all(re.compile(pattern) for pattern in patterns)
    config = SCAPConfig.from_spec("up=0.5", exclude=tuple(patterns))
    return [path for path in paths if path not in select_targets(dict.fromkeys(paths, "up"), config)]


def test_what_the_first_samples_do_not_reach_others_may() -> None:
    model = Numbers(lambda number, count: dict.fromkeys([*TEXT, *VISION] if count > 2 else TEXT, LINE))
    _, found = calibrate(model, groups([*TEXT, *VISION]), range(8), 0)
    # The first pass runs the vision tower dense for a while: one more.
    assert model.limits == [1, 1, 1, 2, 4, 1, 1, 2, 4] and found.keys() == {*TEXT, *VISION}
    assert all(abs(criterion.threshold - 0.5) < 0.02 for criterion in found.values())


def test_what_is_zero_in_the_first_samples_may_be_something_in_others() -> None:
    zeros = np.zeros_like(LINE)
    model = Numbers(lambda number, count: {"up_proj": zeros if number < 2 else LINE})
    _, found = calibrate(model, groups(["up_proj"]), range(8), 0)
    assert found["up_proj"].threshold > 0


@pytest.mark.parametrize("gain", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("count", [1, 3, 8, 64])
def test_thresholds_hold_while_all_layers_are_sparse(gain: float, count: int) -> None:
    """The second layer's activations shrink with what the first one prunes: by `gain` times that part."""
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((64, 500)).astype(np.float32) for _ in range(2))

    class Chain(Numbers):
        def collector(self, groups: Sequence[Group], scales: Mapping[str, Any]) -> Collector:
            model = self

            class Run(_Collector):
                def run(self, sample: Any, visit: Visit) -> None:
                    pruned = model.criteria[-1]["a.up_proj"].prunes(first[sample]).mean()
                    visit("a.up_proj", first[sample])
                    visit("b.up_proj", second[sample] * np.float32(1 - gain * pruned))

            return Run(self)

    model = Chain(lambda number, count: {})
    _, found = calibrate(model, groups(["a.up_proj", "b.up_proj"]), range(count), 0)
    pruned = [found["a.up_proj"].prunes(first[sample]).mean() for sample in range(count)]
    shrunk = np.stack([second[sample] * (1 - gain * part) for sample, part in enumerate(pruned)]).astype(np.float32)
    assert np.mean(pruned) == pytest.approx(0.5, abs=0.01)
    assert found["b.up_proj"].prunes(shrunk).mean() == pytest.approx(0.5, abs=0.01)


def test_many_samples_are_read_once_and_a_bit() -> None:
    model = everywhere(np.random.default_rng(0).standard_normal((100, 40)).astype(np.float32))
    calibrate(model, groups(["b.up_proj"]), range(64), 0)
    assert model.limits == [1, 1, 2, 4, 8, 8, 16, 32]


def test_a_part_that_no_sample_reaches_is_named_with_the_flag_that_leaves_it_dense() -> None:
    message = refusal([*TEXT, *VISION], TEXT)
    assert message.startswith(f"layer {VISION[0]}: ")
    assert (
        r"3 layers to prune in model.vision_tower; leave them dense with --scap-exclude '^model\.vision_tower\.'"
        in (message)
    )
    assert excluded(message, [*TEXT, *VISION]) == VISION


@pytest.mark.parametrize("count", [1, 2, 4])
def test_layers_here_and_there(count: int) -> None:
    paths = [f"layers.{i}.{name}" for i in range(4) for name in ("up_proj", "down_proj")]
    unseen = [path for path in paths if path.endswith("up_proj")][:count]
    message = refusal(paths, [path for path in paths if path not in unseen])
    assert excluded(message, paths) == unseen


def test_nothing_is_reached_at_all() -> None:
    model = reaching()
    with pytest.raises(SCAPError, match="never reached it; calibrate on data that the model reads"):
        calibrate(model, groups(TEXT), range(8), 0)
    assert len(model.limits) == 1


def test_no_samples_at_all() -> None:
    with pytest.raises(SCAPError, match="the calibration dataset is empty"):
        calibrate(reaching(*TEXT), groups(TEXT), [], 0)


def test_activations_of_no_token_are_none() -> None:
    model = Numbers(lambda number, count: {"up_proj": np.zeros((0, 8), dtype=np.float32)})
    with pytest.raises(SCAPError, match="no activations were seen"):
        calibrate(model, groups(["up_proj"]), range(8), 0)


def test_a_site_of_many_layers_is_not_recited() -> None:
    paths = tuple(f"decoder.{i}.k_proj" for i in range(64))
    model = Numbers(lambda number, count: {paths[0]: np.zeros((4, 8), dtype=np.float32)})
    with pytest.raises(SCAPError, match=r"layer decoder.0.k_proj, .* and 60 more: all of its input") as caught:
        calibrate(model, [Group(Site(paths), paths, TARGET)], range(8), 0)
    assert len(str(caught.value)) < 400


BLOCK = [["b.q_proj", "b.k_proj", "b.v_proj"], ["b.gate_proj", "b.up_proj"], ["b.down_proj"]]


def everywhere(values: Any = LINE) -> Numbers:
    keys = [path for site in BLOCK for path in site]
    return Numbers(lambda number, count: dict.fromkeys(keys, values), BLOCK)


def test_from_a_model_to_its_parameters() -> None:
    """Sites found once and kept, targets per role and per pattern, one criterion per site and target."""
    model = everywhere()
    config = SCAPConfig(
        targets={"q": 0.2, "k": 0.2, "v": 0.4, "gate": 0.5, "up": 0.5, "re:down_proj$": 0.6, "down": 0.9}
    )
    found = Calibration({"model": model}, config).run({"model": range(8)}, "some text")
    assert found is not model.applied and found == model.applied
    assert found.sites == tuple(tuple(site) for site in BLOCK) and found.config.dataset == "some text"
    sparsities = {path.removeprefix("b."): layer.target_sparsity for path, layer in found.layers.items()}
    assert sparsities == {
        "q_proj": 0.2, "k_proj": 0.2, "v_proj": 0.4, "gate_proj": 0.5, "up_proj": 0.5, "down_proj": 0.6
    }  # fmt: skip
    # q and k share a group, v is one of its own
    assert model.criteria[-1].keys() == {"b.q_proj", "b.v_proj", "b.gate_proj", "b.down_proj"}
    for layer in found.layers.values():
        assert np.mean(np.abs(LINE) <= layer.threshold) == pytest.approx(layer.target_sparsity, abs=0.011)


def test_excluded_layers_are_in_no_site() -> None:
    config = SCAPConfig(targets={"up": 0.5, "gate": 0.5}, exclude=("[qk]_proj", "down"))
    found = Calibration({"model": everywhere()}, config).run({"model": range(8)}, "")
    assert found.sites == (("b.v_proj",), ("b.gate_proj", "b.up_proj"))


def test_a_pattern_is_stronger_than_a_role_and_the_first_one_counts() -> None:
    roles = {f"layers.{i}.down_proj": "down" for i in range(3)} | {"lm_head": None}
    config = SCAPConfig(targets={"re:lm_head": 0.1, r"re:layers\.0\.": 0.0, r"re:layers\.[01]\.": 0.3, "down": 0.5})
    found = {path: target.sparsity for path, target in select_targets(roles, config).items()}  # type: ignore[arg-type]
    assert found == {"layers.1.down_proj": 0.3, "layers.2.down_proj": 0.5, "lm_head": 0.1}


def test_a_pattern_that_matches_nothing_is_named() -> None:
    config = SCAPConfig(targets={"re:nothing_like_it": 0.5, "up": 0.5})
    with pytest.raises(SCAPError, match="targets pattern 'nothing_like_it' matches no fully connected layer"):
        Calibration({"model": everywhere()}, config)


@pytest.mark.parametrize("estimator", ["zero", "mean", "kde"])
def test_a_scale_per_channel(estimator: str) -> None:
    """The criterion that comes out prunes its target of s |x - m|, with the scale that the weights give."""
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((3000, 4)) * [1, 2, 1, 3] + (0 if estimator == "zero" else 2)).astype(np.float32)
    model = everywhere(values)
    config = SCAPConfig(targets={"down": Target(sparsity=0.45, estimator=estimator, scale="weight_norm")})
    found = Calibration({"model": model}, config).run({"model": range(8)}, "")
    criterion = found.criterion("b.down_proj")
    np.testing.assert_allclose(criterion.scale, [0.5, 0.5, 2.0, 1.0])
    assert criterion.mode == pytest.approx(0 if estimator == "zero" else 2, abs=0.3)
    scores = np.abs(values - criterion.mode) * criterion.scale
    assert np.mean(scores <= criterion.threshold) == pytest.approx(0.45, abs=0.003)
    assert found.layers["b.down_proj"].tensors == ("scale",)


def test_half_the_power() -> None:
    target = Target(sparsity=0.45, scale="sqrt_weight_norm")
    found = Calibration({"model": everywhere(np.ones((50, 4), np.float32))}, SCAPConfig(targets={"down": target}))
    scale = found.run({"model": range(8)}, "").criterion("b.down_proj").scale
    np.testing.assert_allclose(scale, np.sqrt([1, 1, 4, 2]) / np.sqrt([1, 1, 4, 2]).mean(), rtol=1e-6)


def test_an_allocation_redistributes_what_the_targets_ask_for() -> None:
    seen = {}

    def allocation(groups: Any, statistics: Any, weights: Any) -> dict[str, float]:
        seen.update(weights)
        assert all(statistics[group.key].sparsity(Criterion(np.float32(0), np.float32(2))) == 1 for group in groups)
        return {group.key: 0.2 if group.key == "b.down_proj" else 0.8 for group in groups}

    model = everywhere()
    found = Calibration({"model": model}, SCAPConfig(targets={"up": 0.5, "gate": 0.5, "down": 0.5})).run(
        {"model": range(8)}, "", allocation
    )
    assert seen == {"b.gate_proj": 64, "b.down_proj": 32}
    assert {path: layer.target_sparsity for path, layer in found.layers.items()} == {
        "b.gate_proj": 0.8, "b.up_proj": 0.8, "b.down_proj": 0.2
    }  # fmt: skip
    assert found.layers["b.up_proj"].threshold == pytest.approx(0.8, abs=0.011)


def test_a_dense_model_skips_nothing() -> None:
    assert measure_sparsity(everywhere(), []) == {}
