"""The passes of a calibration, on a backend made of numbers."""

import re
import shlex
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optimum_scap import RoleTarget, SCAPConfig, SCAPError
from optimum_scap.core.calibration import Site, calibrate, select_targets


TARGET = RoleTarget(sparsity=0.5)
TEXT = [f"model.language_model.layers.{i}.mlp.up_proj" for i in range(3)]
VISION = [f"model.vision_tower.vision_model.encoder.layers.{i}.mlp.fc1" for i in range(3)]


def passes(reached: Callable[[int, float], list[str]]) -> tuple[Callable[..., None], list[float]]:
    """A backend whose pass number i over a fraction of the data reaches the sites that `reached` names."""
    fractions: list[float] = []

    def run_pass(_current: Any, fraction: float, _description: str, visit: Any) -> None:
        for key in reached(len(fractions), fraction):
            visit(key, np.linspace(-1, 1, 101, dtype=np.float32))
        fractions.append(fraction)

    return run_pass, fractions


def sites(paths: list[str]) -> list[Site]:
    return [Site(path, (path,), TARGET) for path in paths]


def refusal(all_sites: list[str], reached: list[str]) -> str:
    run_pass, _ = passes(lambda number, fraction: reached)
    with pytest.raises(SCAPError, match="no activations were seen, the calibration data never reached it") as caught:
        calibrate(sites(all_sites), run_pass, 0)
    return str(caught.value)


def excluded(message: str, paths: list[str]) -> list[str]:
    """The layers that the flags in a message leave dense."""
    words = shlex.split(message.replace(";", " "))
    patterns = [value for flag, value in zip(words, words[1:], strict=False) if flag == "--scap-exclude"]
    assert patterns and all(re.compile(pattern) for pattern in patterns)
    config = SCAPConfig.from_spec("up=0.5", exclude=tuple(patterns))
    return [path for path in paths if path not in select_targets([(path, "up") for path in paths], config)]


def test_what_the_first_samples_do_not_reach_others_may() -> None:
    run_pass, fractions = passes(lambda number, fraction: [*TEXT, *VISION] if fraction == 1 else TEXT)
    found = calibrate(sites([*TEXT, *VISION]), run_pass, 0)
    assert len(fractions) == 3 and found.keys() == {*TEXT, *VISION}
    assert all(abs(thresholding.threshold - 0.5) < 0.02 for thresholding in found.values())


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
    run_pass, fractions = passes(lambda number, fraction: [])
    with pytest.raises(SCAPError, match="never reached it; calibrate on data that the model reads"):
        calibrate(sites(TEXT), run_pass, 0)
    assert len(fractions) == 1


def test_activations_of_no_token_are_none() -> None:
    def run_pass(_current: Any, _fraction: float, _description: str, visit: Any) -> None:
        visit("up_proj", np.zeros((0, 8), dtype=np.float32))

    with pytest.raises(SCAPError, match="no activations were seen"):
        calibrate(sites(["up_proj"]), run_pass, 0)


def test_a_site_of_many_layers_is_not_recited() -> None:
    paths = tuple(f"decoder.{i}.k_proj" for i in range(64))

    def run_pass(_current: Any, _fraction: float, _description: str, visit: Any) -> None:
        visit("k", np.zeros((4, 8), dtype=np.float32))

    with pytest.raises(SCAPError, match=r"layer decoder.0.k_proj, .* and 60 more: all of its input") as caught:
        calibrate([Site("k", paths, TARGET)], run_pass, 0)
    assert len(str(caught.value)) < 400
