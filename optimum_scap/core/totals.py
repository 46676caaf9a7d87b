"""The sparsity of several layers together: the share of all their weights that is skipped."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from .config import Target
from .criterion import Criterion
from .sites import Layers
from .statistics import ActivationStatistics
from .targets import Group


_HALVINGS = 60
# What a sparsity may be: the target of a layer is below 1.
_LARGEST_SPARSITY = 0.999


def group_weights(groups: Sequence[Group], layers: Layers) -> dict[str, int]:
    """How many weights the layers of each group have, by group key."""
    shapes = layers.prunable
    return {
        group.key: sum(shapes[path].in_features * shapes[path].out_features for path in group.layers)
        for group in groups
    }


def weighted_total(sparsities: Mapping[str, float], weights: Mapping[str, int]) -> float:
    """The share of all `weights` that is skipped at these sparsities; both by group key."""
    return sum(sparsities[key] * weights[key] for key in weights) / sum(weights.values())


def spread(sparsities: Mapping[str, float], weights: Mapping[str, int], total: float) -> dict[str, float]:
    """Sparsities in (0, 1) whose total is `total`: the odds of all given ones are multiplied by one factor."""

    def moved(log_factor: float) -> dict[str, float]:
        return {
            key: 1.0 / (1.0 + math.exp(-math.log(value / (1.0 - value)) - log_factor))
            for key, value in sparsities.items()
        }

    return moved(_root(lambda log_factor: weighted_total(moved(log_factor), weights) - total, -20.0, 20.0))


def at_total(
    statistics: Mapping[str, ActivationStatistics],
    criteria: Mapping[str, Criterion],
    weights: Mapping[str, int],
    total: float,
) -> dict[str, float]:
    """The sparsity of each group where one common factor on all thresholds brings their total to `total`.

    Args:
        statistics: of what enters each group, by group key.
        criteria: whose thresholds are multiplied.
        weights: how many each group reads.
        total: what is asked for. Where the last of it lies between two values of activations, as of layers whose
            inputs are mostly zero, the sparsities are spread to it.
    """

    seen = {key: statistics[key].distribution(criterion) for key, criterion in criteria.items()}

    def found(log_factor: float) -> dict[str, float]:
        factor = np.float32(math.exp(log_factor))
        sparsities = {}
        for key, (scores, fractions) in seen.items():
            count = int(np.searchsorted(scores, criteria[key].threshold * factor, side="right"))
            sparsities[key] = float(fractions[count - 1]) if count else 0.0
        return sparsities

    factor = _root(lambda log_factor: weighted_total(found(log_factor), weights) - total, -10.0, 10.0)
    sparsities = {key: min(max(value, 1e-4), _LARGEST_SPARSITY) for key, value in found(factor).items()}
    return spread(sparsities, weights, total)


def with_sparsities(groups: Sequence[Group], sparsities: Mapping[str, float]) -> list[Group]:
    """`groups` with other targets, by group key."""
    return [
        replace(
            group,
            target=Target.model_validate({**group.target.model_dump(), "sparsity": float(sparsities[group.key])}),
        )
        for group in groups
    ]


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function changes its sign, by bisection."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2
