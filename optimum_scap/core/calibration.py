"""The algorithm: from a model and samples of its inputs to the parameters of every pruned layer. Knows no framework.

    layers -> sites -> targets -> statistics -> criteria -> parameters

Thresholds must hold while all other layers are sparse too (the reference calibrates each layer behind layers that are
already pruned), so the passes over the data are repeated under the current criteria until the sparsity they realize
has settled.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..errors import SCAPError
from ..progress import length, run_over
from .backend import Backend, Collector
from .config import SCAPConfig, Target
from .criterion import KEEP_ALL, Criterion
from .parameters import LayerParameters, SCAPParameters
from .sites import Layers, Site
from .statistics import ActivationStatistics
from .targets import Group, choose_targets, is_excluded, make_groups
from .unreached import names_of, never_reached


if TYPE_CHECKING:
    from numpy.typing import NDArray


logger = logging.getLogger(__name__)

SETTLED = 0.004
MAX_PASSES = 8
FIRST_PASS_FRACTION = 0.25
# Behind that many passes a mode stays what it is where the threshold has to be found for a given one.
MODE_PASSES = 2

# What redistributes sparsity: (groups, their statistics on the dense model, the weights that each reads) to a sparsity
# per group key, which skips as many weights as the targets do.
Allocation = Callable[[Sequence[Group], Mapping[str, ActivationStatistics], Mapping[str, int]], Mapping[str, float]]


class Calibration:
    """What is known about a model, or several that work together, before any sample is read.

    Args:
        backends: the models by name.
        config: what to prune.

    Raises:
        SCAPError: if a model is sparse already, nothing in any of them matches the config, or one could not be saved.
    """

    def __init__(self, backends: Mapping[str, Backend], config: SCAPConfig) -> None:
        self._backends = backends
        self._config = config
        self._layers = {name: backend.layers() for name, backend in backends.items()}
        self._targets = choose_targets(_all_layers(self._layers.values()), config)
        for backend in backends.values():
            backend.check_can_be_saved()

    def run(
        self, samples: Mapping[str, Iterable[Any]], dataset: str, allocation: Allocation | None = None
    ) -> SCAPParameters:
        """Finds the parameters of all layers to prune and applies them. No model is touched until all are calibrated.

        Args:
            samples: inputs per model name; iterated several times. A model without samples stays dense.
            dataset: what the samples are, for the record.
            allocation: redistributes the sparsity that the targets ask for.

        Returns:
            The parameters of all pruned layers. Every changed model carries its own.

        Raises:
            SCAPError: if calibration is impossible.
        """
        found = {}
        for name, backend in self._backends.items():
            layers = self._layers[name]
            targets = {path: target for path, target in self._targets.items() if path in layers.prunable}
            if targets and name in samples:
                sites = backend.find_sites(layers, samples[name])
                groups = make_groups(sites, targets)
                groups, criteria = calibrate(backend, groups, samples[name], self._config.seed, layers, allocation)
                found[name] = self._parameters(layers, sites, groups, criteria, dataset)
        if not found:
            raise SCAPError("the calibration dataset has no samples for any model that holds layers to prune")
        for name, parameters in found.items():
            self._backends[name].apply(parameters)
        return SCAPParameters.merged(found.values())

    def _parameters(
        self,
        layers: Layers,
        sites: Iterable[Site],
        groups: Iterable[Group],
        criteria: Mapping[str, Criterion],
        dataset: str,
    ) -> SCAPParameters:
        by_path = {path: group for group in groups for path in group.layers}
        parameters = SCAPParameters(
            version=__version__,
            config=self._config.model_copy(update={"dataset": dataset}),
            apply_to=self._config.apply_to,
            dense_layers=self._config.dense_layers,
            sites=tuple(
                kept
                for site in sites
                if (kept := tuple(path for path in site.layers if not is_excluded(path, self._config)))
            ),
            layers={
                path: LayerParameters.of(criteria[by_path[path].key], layer.role, by_path[path].target)
                for path, layer in layers.prunable.items()
                if path in by_path
            },
        )
        for path, group in by_path.items():
            scale = criteria[group.key].scale
            if scale is not None:
                parameters = parameters.with_tensor(path, "scale", scale)
        return parameters


def calibrate(
    backend: Backend,
    groups: Sequence[Group],
    samples: Iterable[Any],
    seed: int,
    layers: Layers | None = None,
    allocation: Allocation | None = None,
) -> tuple[list[Group], dict[str, Criterion]]:
    """Finds the criterion of every group of one model.

    Args:
        backend: the model.
        groups: what is to be pruned.
        samples: model inputs; iterated several times.
        seed: seed of the sketches.
        layers: the shapes of the layers, for `allocation`.
        allocation: redistributes the sparsity that the targets ask for.

    Returns:
        The groups, with the targets of the allocation, and {group key: criterion}; on the calibration data, with all
        of them in force, each layer prunes its target within 0.01 (more where activations equal to the threshold
        make that impossible).

    Raises:
        SCAPError: naming the layer whose activations cannot be calibrated.
    """
    groups = list(groups)
    scales = {group.key: scale for group in groups if (scale := _channel_scale(backend, group)) is not None}
    current = {group.key: KEEP_ALL for group in groups}
    modes = dict.fromkeys(current, np.float32(0.0))
    total = length(samples)
    with backend.collector(groups, scales) as collector:
        for number in range(MAX_PASSES):
            # A dense pass only has to give a starting point: the passes behind it see other activations anyway.
            limit = None if total is None else max(1, math.ceil(total * (FIRST_PASS_FRACTION if number == 0 else 1.0)))
            statistics = {
                group.key: backend.statistics(names_of(group.layers), seed, scales.get(group.key), modes[group.key])
                for group in groups
            }
            seen = _run_pass(collector, current, samples, total, limit, number, statistics)
            unseen = [group for group in groups if group.key not in seen]
            if unseen and (number > 0 or len(unseen) == len(groups)):
                raise SCAPError(never_reached(unseen, groups))
            if number == 0 and allocation is not None:
                groups = _allocated(groups, statistics, layers, allocation)
            # What the first samples do not reach, others may.
            reached = [group for group in groups if group.key in seen]
            solved = {
                group.key: statistics[group.key].solve(group.target.estimator, group.target.sparsity)
                for group in reached
            }
            # With a scale a threshold belongs to the mode that was given: that of the pass before.
            moved = number < MODE_PASSES and _moved_modes(reached, statistics, scales, modes)
            drifts = [_drift(statistics[group.key], current[group.key], solved[group.key]) for group in reached]
            worst = int(np.argmax(drifts))
            logger.info("pass %d: largest drift %.4f (%s)", number + 1, drifts[worst], names_of(reached[worst].layers))
            # The correction that the last pass found is taken along, small as it is: it is known, and costs nothing.
            current = {**current, **solved}
            if number > 0 and drifts[worst] <= SETTLED and not moved:
                return groups, current
    logger.warning(
        "thresholds did not settle in %d passes: %s still moves by %.3f sparsity; more calibration samples may help",
        MAX_PASSES,
        names_of(reached[worst].layers),
        drifts[worst],
    )
    return groups, current


def _run_pass(
    collector: Collector,
    criteria: Mapping[str, Criterion],
    samples: Iterable[Any],
    total: int | None,
    limit: int | None,
    number: int,
    statistics: Mapping[str, ActivationStatistics],
) -> set[str]:
    """Feeds the statistics under the criteria; the keys of the groups that were reached."""
    seen: set[str] = set()

    def visit(key: str, activations: Any) -> None:
        if 0 not in activations.shape:
            seen.add(key)
        statistics[key].add(activations)

    collector.set(criteria)
    run = partial(collector.run, visit=visit)
    if run_over(samples, run, total, f"SCAP calibration, pass {number + 1}", limit) == 0:
        raise SCAPError("the calibration dataset is empty")
    return seen


def _moved_modes(
    groups: Iterable[Group],
    statistics: Mapping[str, ActivationStatistics],
    scales: Mapping[str, Any],
    modes: dict[str, np.float32],
) -> bool:
    """Takes over the modes that groups with a scale have now; whether one of them moved."""
    moved = False
    for group in groups:
        if group.key in scales:
            mode = statistics[group.key].mode(group.target.estimator, group.target.sparsity)
            moved = moved or mode != modes[group.key]
            modes[group.key] = mode
    return moved


def _channel_scale(backend: Backend, group: Group) -> "NDArray[np.float32] | None":
    """The scale per channel that the target asks for; on average the channels keep their thresholds."""
    if group.target.scale == "none":
        return None
    norms = np.asarray(backend.channel_norms(group.layers), dtype=np.float64)
    if not np.isfinite(norms).all() or not norms.any():
        raise SCAPError(f"layer {names_of(group.layers)}: its weights are zero or not finite, they give no scale")
    scale = norms if group.target.scale == "weight_norm" else np.sqrt(norms)
    return (scale / scale.mean()).astype(np.float32)


def _allocated(
    groups: Sequence[Group],
    statistics: Mapping[str, ActivationStatistics],
    layers: Layers | None,
    allocation: Allocation,
) -> list[Group]:
    assert layers is not None
    shapes = layers.prunable
    weights = {
        group.key: sum(shapes[path].in_features * shapes[path].out_features for path in group.layers)
        for group in groups
    }
    sparsities = allocation(groups, statistics, weights)
    return [
        Group(
            group.site,
            group.layers,
            Target.model_validate({**group.target.model_dump(), "sparsity": float(sparsities[group.key])}),
        )
        for group in groups
    ]


def _all_layers(parts: Iterable[Layers]) -> Layers:
    parts = list(parts)
    return Layers(
        {path: layer for part in parts for path, layer in part.prunable.items()},
        {path: reason for part in parts for path, reason in part.dense.items()},
        frozenset().union(*(part.experts for part in parts)),
    )


def _drift(statistics: ActivationStatistics, current: Criterion, solved: Criterion) -> float:
    """How far the sparsity of the criterion in force is from that of the one that fits what was just seen."""
    return abs(statistics.sparsity(current) - statistics.sparsity(solved))
