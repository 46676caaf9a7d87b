"""The algorithm: from a model and samples of its inputs to the parameters of every pruned layer. Knows no framework.

    layers -> sites -> targets -> statistics -> criteria -> parameters

How the statistics are read is `stream`'s business.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..errors import SCAPError
from ..progress import ProgressBar
from .backend import Backend
from .config import SCAPConfig, Target
from .criterion import Criterion
from .parameters import LayerParameters, SCAPParameters
from .sites import Layers, Site
from .statistics import ActivationStatistics
from .stream import MODE_PASSES, SETTLED, Stream
from .targets import Group, choose_targets, is_excluded, make_groups, name_roles
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
                groups = make_groups(sites, targets, layers.prunable)
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
    shapes = layers.prunable
    weights = {
        group.key: sum(shapes[path].in_features * shapes[path].out_features for path in group.layers)
        for group in groups
    }
    sparsities = allocation(groups, statistics, weights)
    return [
        replace(
            group,
            target=Target.model_validate({**group.target.model_dump(), "sparsity": float(sparsities[group.key])}),
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
