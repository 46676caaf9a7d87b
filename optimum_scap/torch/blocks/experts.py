"""Mixtures of experts: the module that holds them prunes the inputs of each, prefill and decode.

For a few tokens one operation reads the kept channels of the chosen experts alone; more are sorted by expert.
"""

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from ...core.config import ApplyTo, Experts
from ...core.parameters import LayerParameters
from ...core.roles import Role
from ...core.sites import Layer
from ...errors import SCAPError
from ..dispatch import is_recorded
from ..expert_layers import ExpertLayer, SCAPExpertLayer, is_experts, make_layers, run_experts


def expert_layers(path: str, module: nn.Module, thresholds: Experts) -> dict[str, ExpertLayer]:
    """The layers of the experts in `module`, which is dense, by module path; empty if it holds none."""
    if isinstance(module, _PrunedExperts) or not is_experts(module):
        return {}
    return {f"{path}.{layer.path}".strip("."): layer for layer in make_layers(module, thresholds)}


def describe(path: str, layer: ExpertLayer) -> Layer:
    """The layer at `path` as the core knows it. Single experts that see few tokens share what all of them see."""
    role: Role = layer.name  # type: ignore[assignment]
    pool = None
    if layer.expert is not None:
        pool = f"{path.removesuffix(layer.path)}{layer.name}"
    return Layer(path, role, layer.in_features, layer.out_features, pool)


@contextmanager
def observed(layers: Sequence[ExpertLayer], counts: dict[int, list[int]]) -> Iterator[None]:
    """Has the dense experts that `layers` belong to call them with their inputs.

    Args:
        layers: of any number of modules.
        counts: how many tokens each expert saw, by the id of its module; is added to.
    """
    by_owner: dict[int, tuple[Any, dict[str, ExpertLayer]]] = {}
    for layer in layers:
        by_owner.setdefault(id(layer.owner), (layer.owner, {}))[1][layer.path] = layer
    replaced: list[tuple[Any, str, Any]] = []
    try:
        for key, (owner, named) in by_owner.items():
            total = counts.setdefault(key, [0] * owner.num_experts)
            # accelerate calls what it found when its hook was added
            name = "_old_forward" if hasattr(owner, "_old_forward") else "forward"
            replaced.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, partial(_observed_forward, owner, named, total))
        yield
    finally:
        for owner, name, own in replaced:
            delattr(owner, name)
            if own is not None:
                setattr(owner, name, own)


def _observed_forward(
    experts: nn.Module, layers: dict[str, ExpertLayer], total: list[int], *args: Any, **kwargs: Any
) -> Tensor:
    def count(sizes: list[int]) -> None:
        total[:] = [before + size for before, size in zip(total, sizes, strict=True)]

    return run_experts(experts, layers, *_arguments(args, kwargs), count=count)


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens, their experts and the weights of these, which modules give names of their own."""
    x, index, weights = (*args, *kwargs.values())
    return x, index, weights


def convert_experts(layer: ExpertLayer, parameters: LayerParameters, apply_to: ApplyTo) -> None:
    """Makes the experts prune what enters `layer`, in place.

    Raises:
        SCAPError: if the parameters hold vectors.
    """
    if parameters.tensors:
        raise SCAPError(f"layers of experts take no {' or '.join(parameters.tensors)}")
    owner: Any = layer.owner
    if not isinstance(owner, _PrunedExperts):
        cls: Any = type(owner)
        owner.__class__ = _pruned_class(cls)
        owner.scap_layers = {}
        if hasattr(owner, "_old_forward"):  # accelerate calls what it found when its hook was added
            owner._old_forward = types.MethodType(type(owner).forward, owner)
    layer.__class__ = SCAPExpertLayer
    layer.scap_parameters = parameters  # type: ignore[assignment]
    layer.scap_apply_to = apply_to  # type: ignore[assignment]
    layer.scap_mode = parameters.mode  # type: ignore[assignment]
    layer.scap_threshold = parameters.threshold  # type: ignore[assignment]
    parent = owner
    if layer.expert is not None:
        if str(layer.expert) not in owner._modules:
            owner.add_module(str(layer.expert), nn.Module())
        parent = owner._modules[str(layer.expert)]
    parent.add_module(layer.name, layer)
    owner.prepare()


class _PrunedExperts:
    """What is added to the class of a module of experts."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the module's own."""
        if is_recorded():
            raise SCAPError("sparse experts cannot be exported; export the dense model, and sparsify what is exported")
        x, index, weights = _arguments(args, kwargs)
        layers = self._scap_layers()
        # Of the tokens alone it is not known whether they belong to one sequence or to several.
        if x.shape[0] > 1 and any(layer.scap_apply_to == "decode" for layer in layers.values()):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return run_experts(self, layers, x, index, weights)

    def _scap_layers(self) -> dict[str, Any]:
        """The layers that prune, by relative path."""
        children: Any = self._modules  # type: ignore[attr-defined]
        found = {}
        for name, child in children.items():
            if isinstance(child, SCAPExpertLayer):
                found[name] = child
            elif name.isdigit():
                found.update({f"{name}.{inner}": layer for inner, layer in child._modules.items()})
        return found

    def prepare(self) -> None:
        """See `_PrunedInput.prepare`."""

    def __reduce_ex__(self, _protocol: Any) -> Any:
        """The class is made at run time: pickle and deepcopy make it anew from the module's own."""
        reduced: Any = super().__reduce_ex__(2)
        return (_new_experts, type(self).__bases__[1:], *reduced[2:])


def _new_experts(cls: type) -> Any:
    pruned = _pruned_class(cls)
    return pruned.__new__(pruned)


@cache
def _pruned_class(cls: type) -> Any:
    return type(cls.__name__, (_PrunedExperts, cls), {"__module__": cls.__module__})
