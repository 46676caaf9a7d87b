"""SCAP on a torch model: what `core.backend` asks for, and what is asked about sparse models."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..core import backend as core
from ..core.config import Experts, SCAPConfig
from ..core.criterion import Criterion
from ..core.parameters import SCAPParameters
from ..core.roles import find_role
from ..core.sites import Layer, Layers, Site
from ..core.targets import FEW_TOKENS, Group, first_of
from ..errors import SCAPError
from .apply import apply_parameters, check_is_dense, pruned_layers, read_parameters, source_config
from .blocks.experts import describe, expert_layers
from .collect import TorchCollector, TorchCounter, find_sites
from .expert_layers import ExpertLayer, is_experts
from .learned import adjusted, check_can_learn, fold_gains, learn
from .prunable import in_features, is_fully_connected, is_linear, is_quantized, out_features, weights_of, why_dense
from .readers.nncf import mark_layers
from .saving import check_can_be_saved
from .statistics import TorchActivationStatistics
from .wrappers import has_adapters, saved_modules, unwrap, why_adapter_forbids


if TYPE_CHECKING:
    from numpy.typing import NDArray


__all__ = ["TorchBackend", "measure_sparsity", "pruned_layers", "read_parameters"]

logger = logging.getLogger(__name__)


class TorchBackend(core.Backend):
    """Any `nn.Module`, on any device or several of them, offloaded by accelerate or not, in any float dtype."""

    statistics = TorchActivationStatistics

    def __init__(self, model: nn.Module, experts: Experts = "shared") -> None:
        self._model = model
        self._experts = experts
        self._modules: dict[str, nn.Module] = {}
        # How many tokens each expert saw, by the id of the module that holds it.
        self._tokens: dict[int, list[int]] = {}

    def layers(self) -> Layers:
        check_is_dense(self._model)
        mark_layers(unwrap(self._model))
        forbidden = why_adapter_forbids(self._model)
        self._modules = {
            path: module
            for path, module in saved_modules(self._model)
            if is_fully_connected(module) and module not in forbidden
        }
        for path, module in saved_modules(self._model):
            self._modules.update(expert_layers(path, module, self._experts))
        dense, experts = _left_dense(self._model, forbidden)
        if not self._modules:
            raise SCAPError(
                "the model has no fully connected layer to prune, with floating-point weights or with integers that "
                f"are read{first_of(dense)}"
            )
        source_config(self._model)
        prunable = {
            path: describe(path, module)
            if isinstance(module, ExpertLayer)
            else Layer(path, find_role(path), in_features(module), out_features(module))
            for path, module in self._modules.items()
        }
        return Layers(prunable, dense, experts)

    def check_can_be_saved(self) -> None:
        check_can_be_saved(unwrap(self._model))

    def find_sites(self, layers: Layers, samples: Iterable[Any]) -> list[Site]:
        self._tokens.clear()
        return find_sites(self._model, self._modules, samples)

    @torch.no_grad()
    def channel_norms(self, paths: Sequence[str]) -> "NDArray[np.float32]":
        squares = np.zeros(in_features(self._modules[paths[0]]), dtype=np.float64)
        for path in paths:
            if isinstance(self._modules[path], ExpertLayer):
                raise SCAPError(f"layer {path}: experts take no scale per channel; exclude them, or use scale none")
            weight = weights_of(self._modules[path])
            if weight is None:
                raise SCAPError(f"layer {path}: its weights are offloaded, they give no scale")
            squares += weight.float().square().sum(dim=0).double().cpu().numpy()
        return np.sqrt(squares).astype(np.float32)

    def collector(self, groups: Sequence[Group], scales: "Mapping[str, NDArray[np.float32]]") -> TorchCollector:
        return TorchCollector(self._model, self._modules, groups, scales, self._tokens)

    def check_can_learn(self, config: SCAPConfig, paths: Iterable[str]) -> None:
        check_can_learn(self._model, self._modules, config, paths)

    def learn(
        self,
        groups: Sequence[Group],
        criteria: Mapping[str, Criterion],
        weights: Mapping[str, int],
        samples: Sequence[Any],
        config: SCAPConfig,
    ) -> core.Learned:
        return learn(self._model, self._modules, groups, criteria, weights, samples, config)

    def adjusted(self, learned: core.Learned) -> AbstractContextManager[None]:
        return adjusted(self._modules, learned)

    def fold(self, learned: core.Learned) -> None:
        fold_gains(self._modules, learned)

    def apply(self, parameters: SCAPParameters) -> None:
        self._warn_of_experts()
        apply_parameters(self._model, parameters)
        if has_adapters(self._model):
            logger.warning(
                "PEFT saves adapters without the model, and so without its thresholds; to keep both, save the merged "
                "model: model.merge_and_unload().save_pretrained(...)"
            )

    def _warn_of_experts(self) -> None:
        """Names the experts that the calibration data hardly reached."""
        few = []
        for path, module in saved_modules(self._model):
            tokens = self._tokens.get(id(module), ())
            numbers = [str(number) for number, seen in enumerate(tokens) if seen < FEW_TOKENS]
            if numbers:
                few.append(f"{', '.join(numbers)} of {path}")
        if few:
            more = f"; and of {len(few) - 4} more layers" if len(few) > 4 else ""
            logger.warning(
                "some experts saw fewer than %d calibration tokens, and have the thresholds of all experts of their "
                "layer: %s%s; more samples, or more varied ones, may reach them",
                FEW_TOKENS,
                "; ".join(few[:4]),
                more,
            )

    def counter(self) -> TorchCounter | None:
        layers = pruned_layers(self._model)
        return TorchCounter(self._model, layers) if layers else None


def measure_sparsity(model: nn.Module, samples: Iterable[Any]) -> dict[str, float]:
    """The fraction of input channels that each pruned layer of `model` skips; see `core.backend.measure_sparsity`."""
    return core.measure_sparsity(TorchBackend(model), samples)


def _left_dense(model: nn.Module, forbidden: Mapping[nn.Module, str]) -> tuple[dict[str, str], frozenset[str]]:
    """Why layers cannot be pruned that otherwise would be, by path; and which of them are experts."""
    reasons: dict[str, str] = {}
    experts = set()
    for path, module in saved_modules(model):
        is_layer = is_linear(module) or is_quantized(module)
        reason = forbidden.get(module) if is_layer else None
        reason = reason or why_dense(module)
        # Quantized layers of many a library are no nn.Linear, but as wide as one.
        if reason is None and not is_layer and find_role(path) and hasattr(module, "in_features"):
            reason = f"a {type(module).__name__} is no fully connected layer with floating-point weights"
        if reason is not None:
            reasons[path] = reason
        if is_experts(module):
            continue
        # Where the weights of all experts are held in another way.
        for name, value in module.named_parameters(path, recurse=False):
            if not is_lazy(value) and value.dim() >= 3 and (find_role(name) or "Experts" in type(module).__name__):
                reasons[name] = f"the experts in a {type(module).__name__} are not held as those that can be pruned"
                experts.add(name)
    return reasons, frozenset(experts)
