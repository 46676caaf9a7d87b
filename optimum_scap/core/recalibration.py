"""Known parameters on a model that has changed since: thresholds anew, all else as it was.

Weights that are quantized behind a calibration, or in another program, shift the activations a little. The targets of
the layers, their scales and their bias corrections stay; modes and thresholds are calibrated while the corrections
are in force.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import SCAPError
from .backend import Backend, Learned, check_all_exist
from .calibration import calibrate
from .config import Target
from .parameters import SCAPParameters
from .sites import Layers, Site, match_paths
from .targets import make_groups


class Recalibration:
    """What is known about a model, or several that work together, before any sample is read.

    Args:
        backends: the models by name.
        parameters: what was found before.

    Raises:
        SCAPError: if a model is sparse already, a layer that `parameters` name is missing, a vector does not fit its
            layer, or a model could not be saved.
    """

    def __init__(self, backends: Mapping[str, Backend], parameters: SCAPParameters) -> None:
        self._backends = backends
        self._layers = {name: backend.layers() for name, backend in backends.items()}
        present = [path for layers in self._layers.values() for path in layers.prunable]
        names = match_paths(parameters.layers, present)
        check_all_exist(names, present)
        self._parameters: dict[str, SCAPParameters] = {}
        for name, layers in self._layers.items():
            own = [path for path in parameters.layers if names[path] in layers.prunable]
            if own:
                part = parameters.only(own).renamed({path: str(names[path]) for path in own})
                backends[name].check_can_apply(part, layers)
                backends[name].check_can_be_saved()
                self._parameters[name] = part

    def run(self, samples: Mapping[str, Iterable[Any]], dataset: str) -> SCAPParameters:
        """Finds modes and thresholds, and applies the parameters. No model is touched until all are calibrated.

        Args:
            samples: inputs per model name; iterated several times.
            dataset: what the samples are, for the record.

        Returns:
            The parameters with which the layers realize their targets on the samples.

        Raises:
            SCAPError: if calibration is impossible.
        """
        found = {}
        for name, parameters in self._parameters.items():
            if name not in samples:
                raise SCAPError(f"the calibration dataset has no samples for {name}, whose layers are to be pruned")
            found[name] = _recalibrated(self._backends[name], self._layers[name], parameters, samples[name], dataset)
        for name, parameters in found.items():
            self._backends[name].apply(parameters)
        return SCAPParameters.merged(found.values())


def _recalibrated(
    backend: Backend, layers: Layers, parameters: SCAPParameters, samples: Iterable[Any], dataset: str
) -> SCAPParameters:
    # What prunes nothing keeps its criterion, whatever that is.
    targets = {
        path: Target(sparsity=layer.target_sparsity, estimator=layer.estimator)
        for path, layer in parameters.layers.items()
        if layer.target_sparsity > 0
    }
    sites = backend.find_sites(layers, samples)
    groups = make_groups(_by_scale(sites, parameters), targets, layers.prunable)
    scales = {group.key: scale for group in groups if (scale := parameters.tensor(group.key, "scale")) is not None}
    corrections = {
        path: value for path in parameters.layers if (value := parameters.tensor(path, "bias_correction")) is not None
    }
    changed = dict(parameters.layers)
    if groups:
        with backend.adjusted(Learned({}, corrections)):
            _, criteria = calibrate(backend, groups, samples, parameters.config.seed, scales=scales)
        for group in groups:
            criterion = criteria[group.key]
            update = {"mode": float(criterion.mode), "threshold": float(criterion.threshold)}
            changed |= {path: parameters.layers[path].model_copy(update=update) for path in group.layers}
    config = parameters.config.model_copy(update={"dataset": dataset})
    return parameters.model_copy(update={"layers": changed, "config": config})


def _by_scale(sites: Iterable[Site], parameters: SCAPParameters) -> list[Site]:
    """The sites, those apart whose layers have scales of their own."""
    found = []
    for site in sites:
        apart: dict[bytes | None, list[str]] = {}
        for path in site.layers:
            scale = parameters.tensor(path, "scale") if path in parameters.layers else None
            apart.setdefault(None if scale is None else scale.tobytes(), []).append(path)
        found += [Site(tuple(paths)) for paths in apart.values()]
    return found
