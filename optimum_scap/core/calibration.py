"""The algorithm: from a model and samples of its inputs to the parameters of every pruned layer. Knows no framework.

    layers -> sites -> targets -> statistics -> criteria -> parameters

How the statistics are read is `stream`'s business.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..errors import SCAPError
from ..progress import ProgressBar, length, run_over
from .backend import Backend, Learned
from .config import SCAPConfig
from .criterion import Criterion
from .parameters import LayerParameters, SCAPParameters
from .sites import Layers, Site
from .statistics import ActivationStatistics
from .stream import MODE_PASSES, SETTLED, Stream
from .targets import Group, choose_targets, is_excluded, make_groups, name_roles
from .totals import at_total, group_weights, spread, weighted_total, with_sparsities
from .unreached import names_of


if TYPE_CHECKING:
    from numpy.typing import NDArray


logger = logging.getLogger(__name__)

MAX_PASSES = 8

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
        self._layers = {name: name_roles(backend.layers(), config) for name, backend in backends.items()}
        self._targets = choose_targets(_all_layers(self._layers.values()), config)
        for backend in backends.values():
            backend.check_can_be_saved()
        if config.learn:
            for name, backend in backends.items():
                backend.check_can_learn(
                    config, [path for path in self._targets if path in self._layers[name].prunable]
                )

    def run(
        self,
        samples: Mapping[str, Iterable[Any]],
        dataset: str,
        allocation: Allocation | None = None,
        apply: bool = True,
    ) -> SCAPParameters:
        """Finds the parameters of all layers to prune and applies them. No model is touched until all are calibrated.

        Args:
            samples: inputs per model name; iterated several times. A model without samples stays dense.
            dataset: what the samples are, for the record.
            allocation: redistributes the sparsity that the targets ask for.
            apply: whether the models prune from then on; gains are folded into their weights either way.

        Returns:
            The parameters of all pruned layers. Every changed model carries its own.

        Raises:
            SCAPError: if calibration is impossible.
        """
        found = {}
        learned: dict[str, Learned] = {}
        for name, backend in self._backends.items():
            layers = self._layers[name]
            targets = {path: target for path, target in self._targets.items() if path in layers.prunable}
            if targets and name in samples:
                sites = backend.find_sites(layers, samples[name])
                groups = self._at_total(make_groups(sites, targets, layers.prunable), layers)
                if self._config.learn:
                    groups, criteria, learned[name] = self._learn(backend, groups, samples[name], layers, allocation)
                else:
                    groups, criteria = calibrate(backend, groups, samples[name], self._config.seed, layers, allocation)
                found[name] = self._parameters(layers, sites, groups, criteria, dataset)
                for path, bias in learned[name].biases.items() if name in learned else ():
                    found[name] = found[name].with_tensor(path, "bias_correction", bias)
        if not found:
            raise SCAPError("the calibration dataset has no samples for any model that holds layers to prune")
        for name, parameters in found.items():
            if name in learned:
                self._backends[name].fold(learned[name])
            if apply:
                self._backends[name].apply(parameters)
        return SCAPParameters.merged(found.values())

    def _at_total(self, groups: list[Group], layers: Layers) -> list[Group]:
        """The groups with the total that is asked for, distributed as the targets are."""
        if self._config.total is None:
            return groups
        sparsities = {group.key: group.target.sparsity for group in groups}
        return with_sparsities(groups, spread(sparsities, group_weights(groups, layers), self._config.total))

    def _learn(
        self,
        backend: Backend,
        groups: Sequence[Group],
        samples: Iterable[Any],
        layers: Layers,
        allocation: Allocation | None,
    ) -> tuple[list[Group], dict[str, Criterion], Learned]:
        """Calibrates, learns from there, and calibrates to the sparsities that were learned."""
        config = self._config
        all_samples = list(samples)
        some = all_samples[: config.num_samples]
        groups, criteria = calibrate(backend, groups, some, config.seed, layers, allocation)
        weights = group_weights(groups, layers)
        learned = backend.learn(groups, criteria, weights, all_samples, config)
        with backend.adjusted(learned):
            if "thresholds" in config.learn:
                total = weighted_total({group.key: group.target.sparsity for group in groups}, weights)
                statistics = _statistics(backend, groups, learned.criteria, some, config.seed)
                groups = with_sparsities(groups, at_total(statistics, learned.criteria, weights, total))
            groups, criteria = calibrate(backend, groups, some, config.seed)
        return groups, criteria, learned

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
    scales: "Mapping[str, NDArray[np.float32]] | None" = None,
) -> tuple[list[Group], dict[str, Criterion]]:
    """Finds the criterion of every group of one model.

    Args:
        backend: the model.
        groups: what is to be pruned.
        samples: model inputs; iterated several times.
        seed: seed of the sketches.
        layers: the shapes of the layers, for `allocation`.
        allocation: redistributes the sparsity that the targets ask for.
        scales: per channel, by group key, in place of those that the targets ask for.

    Returns:
        The groups, with the targets of the allocation, and {group key: criterion}; on the calibration data, with all
        of them in force, each layer prunes its target within 0.01 (more where activations equal to the threshold
        make that impossible).

    Raises:
        SCAPError: naming the layer whose activations cannot be calibrated.
    """
    groups = list(groups)
    if scales is None:
        scales = {group.key: scale for group in groups if (scale := _channel_scale(backend, group)) is not None}
    with backend.collector(groups, scales) as collector:
        stream = Stream(backend, collector, groups, scales, samples, seed)
        with ProgressBar("SCAP calibration", stream.expected_steps(allocation is not None)) as bar:
            if allocation is not None:
                stream.groups = _allocated(groups, stream.read_dense(bar), layers, allocation)
            stream.lead_in(bar)
            for number in range(MAX_PASSES):
                if number > 0:
                    bar.lengthen(stream.total)
                worst, drift, moved = stream.read_all(bar, keep_modes=number >= MODE_PASSES)
                logger.info("pass %d: largest drift %.4f (%s)", number + 1, drift, names_of(worst.layers))
                if drift <= SETTLED and not moved:
                    return stream.groups, stream.criteria
    logger.warning(
        "thresholds did not settle in %d passes: %s still moves by %.3f sparsity; more calibration samples may help",
        MAX_PASSES,
        names_of(worst.layers),
        drift,
    )
    return stream.groups, stream.criteria


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
    return with_sparsities(groups, allocation(groups, statistics, group_weights(groups, layers)))


def _statistics(
    backend: Backend,
    groups: Sequence[Group],
    criteria: Mapping[str, Criterion],
    samples: Iterable[Any],
    seed: int,
) -> dict[str, ActivationStatistics]:
    """What enters each group while `criteria` are in force."""
    scales = {key: criterion.scale for key, criterion in criteria.items() if criterion.scale is not None}
    statistics = {
        group.key: backend.statistics(
            names_of(group.layers), seed, criteria[group.key].scale, criteria[group.key].mode
        )
        for group in groups
    }
    with backend.collector(groups, scales) as collector:
        collector.set(criteria)
        run_over(
            samples,
            lambda sample: collector.run(sample, lambda key, activations: statistics[key].add(activations)),
            length(samples),
            "SCAP total",
        )
    return statistics


def _all_layers(parts: Iterable[Layers]) -> Layers:
    parts = list(parts)
    return Layers(
        {path: layer for part in parts for path, layer in part.prunable.items()},
        {path: reason for part in parts for path, reason in part.dense.items()},
        frozenset().union(*(part.experts for part in parts)),
    )
