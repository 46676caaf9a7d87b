"""The pruned layers of a dense model with what is learned in front of and behind them; the layers stay as they are."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core.backend import Learned
from ...core.config import Part
from ...core.criterion import Criterion
from ...core.targets import Group
from ..collect import input_of
from ..prunable import in_features, out_features
from .pruning import Measured, prune_learned


# Stands for a threshold of zero, which has no logarithm.
_SMALLEST = 1e-30


class LearnedLayers:
    """What is learned, and the forwards that apply it.

    Args:
        modules: the fully connected layers by module path.
        groups: what is pruned.
        criteria: what to start from, by group key.
        parts: what is learned.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        groups: Sequence[Group],
        criteria: Mapping[str, Criterion],
        parts: Sequence[Part],
    ) -> None:
        self.groups = groups
        self.modules = {path: modules[path] for group in groups for path in group.layers}
        self._criteria = criteria
        self.log_thresholds: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.gains: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        for group in groups:
            criterion, device = criteria[group.key], device_of(modules[group.key])
            logarithm = math.log(max(float(criterion.threshold), _SMALLEST))
            self.log_thresholds[group.key] = torch.tensor(
                logarithm,
                device=device,
                requires_grad="thresholds" in parts and float(criterion.threshold) > _SMALLEST,
            )
            if criterion.scale is not None:
                self._scales[group.key] = torch.tensor(criterion.scale, device=device)
        for path, module in self.modules.items():
            if "biases" in parts:
                self.biases[path] = torch.zeros(out_features(module), device=device_of(module), requires_grad=True)
            if "gains" in parts:
                self.gains[path] = torch.ones(in_features(module), device=device_of(module), requires_grad=True)
        self.sparse = False
        self.measured: Measured | None = None

    def learned_tensors(self) -> dict[Part, list[Tensor]]:
        """What an optimizer moves."""
        found: dict[Part, list[Tensor]] = {
            "thresholds": [value for value in self.log_thresholds.values() if value.requires_grad],
            "biases": list(self.biases.values()),
            "gains": list(self.gains.values()),
        }
        return {part: tensors for part, tensors in found.items() if tensors}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """A context in which the layers prune where `sparse` says so, and run as they did where not."""
        group_of = {path: group for group in self.groups for path in group.layers}
        with ExitStack() as stack:
            for path, module in self.modules.items():
                stack.enter_context(replaced_forward(module, self._forward(path, group_of[path].key, module.forward)))
            yield

    def _forward(self, path: str, key: str, dense: Callable[..., Tensor]) -> Callable[..., Tensor]:
        mode = float(self._criteria[key].mode)

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if not self.sparse:
                return dense(*args, **kwargs)
            x, log_threshold, scale = input_of(args, kwargs), self.log_thresholds[key], self._scales.get(key)
            # Layers of a group count once.
            measured = (self.measured, key) if self.measured is not None and path == key else None
            output = dense(prune_learned(x, log_threshold, mode, scale, self.gains.get(path), measured))
            bias = self.biases.get(path)
            return output if bias is None else output + bias.to(output.dtype)

        return forward

    def result(self) -> Learned:
        """What was learned, as plain arrays."""
        criteria = {}
        for key, old in self._criteria.items():
            logarithm = self.log_thresholds[key]
            moved = np.float32(math.exp(logarithm.item()))
            criteria[key] = Criterion(old.mode, moved if logarithm.requires_grad else old.threshold, old.scale)
        return Learned(criteria, _arrays(self.biases), _arrays(self.gains))


@contextmanager
def adjusted(modules: Mapping[str, nn.Module], learned: Learned) -> Iterator[None]:
    """A context in which layers multiply what they get by their gains, and add their biases to what they compute."""

    def adjust(dense: Callable[..., Tensor], bias: Tensor | None, gain: Tensor | None) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            x = input_of(args, kwargs)
            output = dense(x if gain is None else x * gain.to(x.dtype))
            return output if bias is None else output + bias.to(output.dtype)

        return forward

    with ExitStack() as stack:
        for path in dict.fromkeys((*learned.biases, *learned.gains)):
            module = modules[path]
            bias, gain = (_tensor(values.get(path), module) for values in (learned.biases, learned.gains))
            stack.enter_context(replaced_forward(module, adjust(module.forward, bias, gain)))
        yield


@torch.no_grad()
def fold_gains(modules: Mapping[str, nn.Module], learned: Learned) -> None:
    """Multiplies the weights of every input channel by its gain, in place."""
    for path, values in learned.gains.items():
        weight: Any = modules[path].weight
        gain = torch.tensor(values, device=weight.device)
        gain = gain if isinstance(modules[path], nn.Linear) else gain[:, None]  # Conv1D: [in_features, out_features]
        weight.copy_(weight.float() * gain if weight.dtype != torch.float64 else weight * gain)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A context in which `module` runs `forward`; hooks on it run as before."""
    own = vars(module).get("forward")  # accelerate's, or one of the user's
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def device_of(module: nn.Module) -> torch.device:
    """Where the weights of a fully connected layer are."""
    place: Any = getattr(module, "weight", None)
    device = place.device if isinstance(place, Tensor) else getattr(module, "device", None)
    if not isinstance(device, torch.device):
        device = next(tensor.device for tensor in (*module.parameters(), *module.buffers()))
    return device


def _tensor(values: Any, module: nn.Module) -> Tensor | None:
    return None if values is None else torch.tensor(values, device=device_of(module))


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {path: value.detach().cpu().numpy().copy() for path, value in tensors.items()}
