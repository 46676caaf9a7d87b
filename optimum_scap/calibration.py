"""From activations to the mode and the threshold of every layer. Knows no framework.

A backend lists its `Site`s (one per pruned input) and runs the model over the calibration data on request. Thresholds
must hold while all other layers are sparse too (the reference calibrates each layer behind layers that are already
pruned), so the passes are repeated under the current thresholds until the sparsity they realise has settled.
"""

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .config import RoleTarget, SCAPConfig
from .errors import SCAPError
from .roles import Role
from .statistics import ActivationStatistics


logger = logging.getLogger(__name__)

SETTLED = 0.004
MAX_PASSES = 8
FIRST_PASS_FRACTION = 0.25


@dataclass(frozen=True)
class Thresholding:
    """Mode and threshold of one site. A threshold below zero keeps every channel."""

    mode: np.float32
    threshold: np.float32


KEEP_ALL = Thresholding(np.float32(0.0), np.float32(-1.0))


@dataclass(frozen=True)
class Site:
    """One input that is pruned, for all the layers that read it with the same target.

    Args:
        key: identifies the site within its model.
        layers: module paths of the layers behind it.
        target: sparsity and mode estimator.
    """

    key: str
    layers: tuple[str, ...]
    target: RoleTarget


# visit(site key, activations), the activations being of the kind that the backend's statistics take
Visit = Callable[[str, Any], None]
# run_pass(current thresholds per site key, fraction of the data to use, description, visit)
RunPass = Callable[[dict[str, Thresholding], float, str, Visit], None]


def calibrate(
    sites: Iterable[Site],
    run_pass: RunPass,
    seed: int,
    new_statistics: Callable[..., ActivationStatistics] = ActivationStatistics,
) -> dict[str, Thresholding]:
    """Finds the mode and the threshold of every site.

    Args:
        sites: the sites of one model.
        run_pass: runs the model over (a fraction of) the calibration data with the given thresholds in force and
            calls `visit(key, activations)` with the input of each site, before it is pruned.
        seed: seed of the sketches.
        new_statistics: makes the statistics of one site (name, seed); a backend may collect them where its activations
            are.

    Returns:
        {site key: Thresholding}; on the calibration data, with all of them in force, each site prunes its target
        within 0.01 (more where activations equal to the threshold make that impossible).

    Raises:
        SCAPError: naming the layer whose activations cannot be calibrated.
    """
    sites = list(sites)
    current = {site.key: KEEP_ALL for site in sites}
    for number in range(MAX_PASSES):
        # A dense pass only has to give a starting point: the passes behind it see other activations anyway.
        fraction = FIRST_PASS_FRACTION if number == 0 else 1.0
        statistics = {site.key: new_statistics(", ".join(site.layers), seed=seed) for site in sites}
        run_pass(current, fraction, f"SCAP calibration, pass {number + 1}", partial(_visit, statistics))
        solved = {
            site.key: Thresholding(*statistics[site.key].solve(site.target.mode, site.target.sparsity))
            for site in sites
        }
        drifts = [_drift(statistics[site.key], current[site.key], solved[site.key]) for site in sites]
        worst = int(np.argmax(drifts))
        logger.info("pass %d: largest drift %.4f (%s)", number + 1, drifts[worst], ", ".join(sites[worst].layers))
        # The correction that the last pass found is taken along, small as it is: it is known, and costs nothing.
        current = solved
        if number > 0 and drifts[worst] <= SETTLED:
            return current
    logger.warning(
        "thresholds did not settle in %d passes: %s still moves by %.3f sparsity; more calibration samples may help",
        MAX_PASSES,
        ", ".join(sites[worst].layers),
        drifts[worst],
    )
    return current


def _visit(statistics: dict[str, ActivationStatistics], key: str, activations: Any) -> None:
    statistics[key].add(activations)


def _drift(statistics: ActivationStatistics, current: Thresholding, solved: Thresholding) -> float:
    """How far the sparsity of the thresholds in force is from that of the thresholds that fit what was just seen."""
    return abs(
        statistics.sparsity(float(current.mode), float(current.threshold))
        - statistics.sparsity(float(solved.mode), float(solved.threshold))
    )


def check_patterns(paths: Iterable[str], config: SCAPConfig) -> None:
    """Checks that every include and exclude pattern matches at least one of the module paths.

    Raises:
        SCAPError: naming the pattern that matches none.
    """
    paths = list(paths)
    for field, patterns in (("include", config.include), ("exclude", config.exclude)):
        for pattern in patterns:
            if not any(re.search(pattern, path) for path in paths):
                raise SCAPError(
                    f"{field} pattern {pattern!r} matches no fully connected layer; the model has, for example, "
                    f"{', '.join(paths[:3]) or 'none'}"
                )


def select_targets(layers: Iterable[tuple[str, Role | None]], config: SCAPConfig) -> dict[str, RoleTarget]:
    """Which of the layers (module path, role) are to be pruned, and how much."""

    def wanted(path: str) -> bool:
        included = not config.include or any(re.search(pattern, path) for pattern in config.include)
        return included and not any(re.search(pattern, path) for pattern in config.exclude)

    targets = {path: config.targets[role] for path, role in layers if role in config.targets and wanted(path)}
    return {path: target for path, target in targets.items() if target.sparsity > 0}
