"""SCAP on an `ov.Model`: what `core.backend` asks for, and what is asked about sparse models."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov

from ..core import backend as core
from ..core.parameters import SCAPParameters
from ..core.roles import module_path
from ..core.sites import Layer, Layers, Site, match_paths
from ..core.targets import Group
from ..errors import SCAPError, printable
from .collect import OpenVINOCollector, OpenVINOCounter
from .graph import FullyConnected, evaluate_weights, group_by_input, named_layers
from .names import name_layers
from .parameters import RT_INFO, read_parameters
from .threshold_ops import add_bias_correction, find_threshold_ops, insert_threshold_ops


if TYPE_CHECKING:
    from numpy.typing import NDArray


__all__ = ["OpenVINOBackend", "measure_sparsity", "read_parameters"]


class OpenVINOBackend(core.Backend):
    """One `ov.Model`, uncompressed or with weights compressed by NNCF.

    Args:
        model: the model.
        name: what it is called among the models that work together, for messages.
    """

    def __init__(self, model: ov.Model, name: str = "model") -> None:
        self._model = model
        self._name = name
        # Bias corrections that are in force while thresholds are calibrated.
        self._corrections: Mapping[str, NDArray[np.float32]] = {}

    def layers(self) -> Layers:
        self._check_is_dense()
        name_layers(self._model)
        named = named_layers(self._model)
        prunable = {
            path: Layer(path, layer.role, layer.in_features, layer.out_features) for path, layer in named.items()
        }
        experts = _experts(self._model, named)
        return Layers(prunable, experts, frozenset(experts))

    def find_sites(self, layers: Layers, samples: Iterable[Any]) -> list[Site]:
        groups = group_by_input(named_layers(self._model).values())
        return [Site(tuple(layer.path for layer in group)) for group in groups]

    def channel_norms(self, paths: Sequence[str]) -> "NDArray[np.float32]":
        named = named_layers(self._model)
        squares = sum(np.square(evaluate_weights(named[path]), dtype=np.float64).sum(axis=0) for path in paths)
        return np.sqrt(squares).astype(np.float32)

    def collector(self, groups: Sequence[Group], scales: "Mapping[str, NDArray[np.float32]]") -> OpenVINOCollector:
        return OpenVINOCollector(self._model, groups, scales, self._corrections)

    @contextmanager
    def adjusted(self, learned: core.Learned) -> Iterator[None]:
        if learned.gains:
            raise SCAPError("gains are folded into floating-point weights, before a model is exported")
        self._corrections = learned.biases
        try:
            yield
        finally:
            self._corrections = {}

    def check_can_apply(self, parameters: SCAPParameters, layers: Layers) -> None:
        for path in parameters.layers:
            _check_fits(layers.prunable[path], parameters)

    def apply(self, parameters: SCAPParameters) -> None:
        self._check_is_dense()
        name_layers(self._model)
        named = named_layers(self._model)
        names = match_paths(parameters.layers, named)
        if not named:
            raise SCAPError("the model has no fully connected layer (a MatMul with constant 2-D weights) to prune")
        core.check_all_exist(names, list(named))
        parameters = parameters.renamed({path: name for path, name in names.items() if name is not None})
        for path in parameters.layers:
            layer = named[path]
            _check_fits(Layer(path, layer.role, layer.in_features, layer.out_features), parameters)
        # Layers that read the same activations by the same criterion share the operations.
        for site in group_by_input(named[path] for path in parameters.layers):
            shared: dict[Any, list[FullyConnected]] = {}
            for layer in site:
                shared.setdefault(parameters.criterion(layer.path).key, []).append(layer)
            for group in shared.values():
                criterion = parameters.criterion(group[0].path)
                insert_threshold_ops(group, criterion, decode_only=parameters.apply_to == "decode")
                for layer in group:
                    correction = parameters.tensor(layer.path, "bias_correction")
                    if correction is not None:
                        add_bias_correction(layer, correction)
        self._model.validate_nodes_and_infer_types()
        self._model.set_rt_info(parameters.model_dump_json(), RT_INFO)

    def _check_is_dense(self) -> None:
        if self._model.has_rt_info(RT_INFO) or find_threshold_ops(self._model):
            raise SCAPError(f"{self._name} already holds SCAP threshold operations; start from the model without them")

    def counter(self) -> OpenVINOCounter | None:
        return OpenVINOCounter(self._model) if find_threshold_ops(self._model) else None


def measure_sparsity(model: ov.Model, samples: Iterable[Any], total: int | None = None) -> dict[str, float]:
    """The fraction of input channels that each pruned layer of `model` skips; see `core.backend.measure_sparsity`."""
    return core.measure_sparsity(OpenVINOBackend(model), samples, total)


def _experts(model: ov.Model, named: Mapping[str, FullyConnected]) -> dict[str, str]:
    """Why the experts of a mixture-of-experts model stay dense, by module path."""
    reason = "experts of a mixture-of-experts model are not pruned yet"
    paths = [
        module_path(node.get_friendly_name())
        for node in model.get_ops()
        if node.get_type_name() == "MatMul" and ".experts" in node.get_friendly_name()
    ]
    return {path: reason for path in paths if path not in named}


def _check_fits(layer: Layer, parameters: SCAPParameters) -> None:
    core.check_fits(layer, parameters)
    if parameters.tensor(layer.path, "bias_correction") is not None and parameters.apply_to == "decode":
        raise SCAPError(
            f"layer {printable(layer.path)}: a bias correction belongs to pruned tokens, and an OpenVINO model cannot "
            "add it to those alone: use apply_to all"
        )
