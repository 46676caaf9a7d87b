"""From activations to the mode and the threshold of every layer. Knows no framework.

A backend lists its `Site`s (one per pruned input) and runs the model over the calibration data on request. Thresholds
must hold while all other layers are sparse too (the reference calibrates each layer behind layers that are already
pruned), so the passes are repeated under the current thresholds until the sparsity they realise has settled.
"""

import logging
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np

from ..errors import SCAPError, printable
from .config import RoleTarget, SCAPConfig
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
        statistics = {site.key: new_statistics(_names(site.layers), seed=seed) for site in sites}
        seen: set[str] = set()
        run_pass(current, fraction, f"SCAP calibration, pass {number + 1}", partial(_visit, statistics, seen))
        unseen = [site for site in sites if site.key not in seen]
        if unseen and (number > 0 or len(unseen) == len(sites)):
            raise SCAPError(_never_reached(unseen, sites))
        # What the first samples do not reach, others may.
        reached = [site for site in sites if site.key in seen]
        solved = {
            site.key: Thresholding(*statistics[site.key].solve(site.target.mode, site.target.sparsity))
            for site in reached
        }
        drifts = [_drift(statistics[site.key], current[site.key], solved[site.key]) for site in reached]
        worst = int(np.argmax(drifts))
        logger.info("pass %d: largest drift %.4f (%s)", number + 1, drifts[worst], _names(reached[worst].layers))
        # The correction that the last pass found is taken along, small as it is: it is known, and costs nothing.
        current = {**current, **solved}
        if number > 0 and drifts[worst] <= SETTLED:
            return current
    logger.warning(
        "thresholds did not settle in %d passes: %s still moves by %.3f sparsity; more calibration samples may help",
        MAX_PASSES,
        _names(reached[worst].layers),
        drifts[worst],
    )
    return current


def _names(layers: Sequence[str]) -> str:
    """The layers of a site for a message: the keys of cross-attention read one input in every block."""
    more = f" and {len(layers) - 4} more" if len(layers) > 4 else ""
    return printable(", ".join(layers[:4]), 1000) + more


def _never_reached(unseen: Sequence[Site], sites: Sequence[Site]) -> str:
    """Says which part of the model no sample reached, as the vision tower of a model that is calibrated on text."""
    layers = [path for site in unseen for path in site.layers]
    others = [path for site in sites if site not in unseen for path in site.layers]
    first = printable(layers[0])
    reason = "no activations were seen, the calibration data never reached"
    if not others:
        return f"layer {first}: {reason} it; calibrate on data that the model reads, of which not all is padding"
    part = _part_without(layers, others)
    if part is not None:
        flag = shlex.quote(f"^{re.escape(part)}\\.")
        return (
            f"layer {first}: {reason} it, nor any other of the {len(layers)} layers to prune in {printable(part)}; "
            f"leave them dense with --scap-exclude {printable(flag)} (exclude), or calibrate on data that it reads"
        )
    flags = " ".join(f"--scap-exclude {shlex.quote(f'^{re.escape(path)}$')}" for path in layers[:4])
    more = f" and so on for {len(layers) - 4} more" if len(layers) > 4 else ""
    return (
        f"layer {first}: {reason} it (nor {len(layers) - 1} others); leave such layers dense with "
        f"{printable(flags, 1000)}{more} (exclude), or calibrate on data that reaches them"
    )


def _part_without(layers: Sequence[str], others: Sequence[str]) -> str | None:
    """The largest module that holds all of `layers` and none of `others`."""
    parents = [path.split(".")[:-1] for path in layers]
    common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*parents, strict=False))]
    for depth in range(1, len(common) + 1):
        part = ".".join(common[:depth])
        if not any(path.startswith(f"{part}.") for path in others):
            return part
    return None


def _visit(statistics: dict[str, ActivationStatistics], seen: set[str], key: str, activations: Any) -> None:
    if 0 not in activations.shape:
        seen.add(key)
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
                    f"{field} pattern {printable(pattern)!r} matches no fully connected layer; the model has, for "
                    f"example, {', '.join(paths[:3]) or 'none'}"
                )


def select_targets(layers: Iterable[tuple[str, Role | None]], config: SCAPConfig) -> dict[str, RoleTarget]:
    """Which of the layers (module path, role) are to be pruned, and how much."""

    def wanted(path: str) -> bool:
        included = not config.include or any(re.search(pattern, path) for pattern in config.include)
        return included and not any(re.search(pattern, path) for pattern in config.exclude)

    targets = {path: config.targets[role] for path, role in layers if role in config.targets and wanted(path)}
    return {path: target for path, target in targets.items() if target.sparsity > 0}
