"""Mixtures of experts: the module that holds them prunes the inputs of each, prefill and decode.

For a few tokens one operation reads the kept channels of the chosen experts alone; more are sorted by expert.
"""

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ...core.config import ApplyTo, Experts
from ...core.parameters import LayerParameters
from ...core.roles import Role
from ...core.sites import Layer
from ...errors import SCAPError
from ..dispatch import MAX_SPARSE_ROWS, is_recorded, may_call_kernel
from ..expert_layers import (
    ExpertLayer,
    SCAPExpertLayer,
    first_name,
    is_experts,
    make_layers,
    run_experts,
    tells_gate_from_up,
)
from ..kernels import sparse_experts
from ..linear import contiguous, version, wants_input_major
from .gated import activation_name, is_plain


def expert_layers(path: str, module: nn.Module, thresholds: Experts) -> dict[str, ExpertLayer]:
    """The layers of the experts in `module`, which is dense, by module path; empty if it holds none."""
    if isinstance(module, _PrunedExperts) or not is_experts(module):
        return {}
    return {f"{path}.{layer.path}".strip("."): layer for layer in make_layers(module, thresholds)}


def describe(path: str, layer: ExpertLayer) -> Layer:
    """The layer at `path` as the core knows it. Single experts that see few tokens share what all of them see."""
    role: Role = layer.name  # type: ignore[assignment]
    pool = None
    if layer.expert is not None:  # gate and up read one input
        pool = f"{path.removesuffix(layer.path)}{'down' if layer.name == 'down' else 'up'}"
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
    """Makes the experts prune what enters `layer`, in place. Once all layers are converted, they are to be prepared.

    Raises:
        SCAPError: if the parameters hold vectors.
    """
    if parameters.tensors:
        raise SCAPError(f"layers of experts take no {' or '.join(parameters.tensors)}")
    owner: Any = layer.owner
    if not isinstance(owner, _PrunedExperts):
        cls: Any = type(owner)
        owner.__class__ = _pruned_class(cls)
        owner._scap_operands = None
        owner._scap_activation = activation_name(owner.act_fn) if tells_gate_from_up(owner) else None
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


class _PrunedExperts:
    """What is added to the class of a module of experts."""

    # What of the operation's arguments belongs to the layer; None where it cannot run.
    _scap_operands: tuple[Tensor | None, Tensor | None, Tensor, Tensor] | None
    _scap_versions: tuple[int, ...]
    _scap_activation: str | None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the module's own."""
        if is_recorded():
            raise SCAPError("sparse experts cannot be exported; export the dense model, and sparsify what is exported")
        x, index, weights = _arguments(args, kwargs)
        layers = self.scap_layers()
        if self._can_run_sparse(x, layers):
            assert self._scap_operands is not None and self._scap_activation is not None
            first_bias, last_bias, thresholds, modes = self._scap_operands
            return sparse_experts(
                x,
                index,
                weights,
                self.output_major_weight(first_name(self)),
                self.output_major_weight("down_proj"),
                first_bias,
                last_bias,
                thresholds=thresholds,
                modes=modes,
                activation=self._scap_activation,
            )
        # Of the tokens alone it is not known whether they belong to one sequence or to several.
        if x.shape[0] > 1 and any(layer.scap_apply_to == "decode" for layer in layers.values()):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return run_experts(self, layers, x, index, weights)

    def scap_layers(self) -> dict[str, Any]:
        """The layers that prune, by relative path."""
        children: Any = self._modules  # type: ignore[attr-defined]
        found = {}
        for name, child in children.items():
            if isinstance(child, SCAPExpertLayer):
                found[name] = child
            elif name.isdigit():
                found.update({f"{name}.{inner}": layer for inner, layer in child._modules.items()})
        return found

    def output_major_weight(self, name: str) -> Tensor:
        """The weights as nn.Linear has them, `[experts, out_features, in_features]`, in any order in memory."""
        weight: Tensor = self._parameters[name]  # type: ignore[attr-defined]
        return weight.transpose(1, 2) if self.is_transposed else weight  # type: ignore[attr-defined]

    def prepare(self) -> None:
        """See `_PrunedInput.prepare`."""
        self._scap_operands = None
        names = (first_name(self), "down_proj")
        values = [self._parameters[name] for name in names]  # type: ignore[attr-defined]
        if any(value.is_meta or type(value) is not nn.Parameter or value.dim() != 3 for value in values):
            return
        if self._scap_activation is None:  # the operation does not know how gate and up are combined
            return
        with torch.inference_mode(values[0].is_inference()), torch.no_grad():
            for name, value in zip(names, values, strict=True):
                self._order_weights(name, value)
            self._scap_operands = self._make_operands(values[0].device)
            self._scap_versions = self._versions()

    def _order_weights(self, name: str, parameter: nn.Parameter) -> None:
        """Where a kernel reads the weights, those of one input channel lie together."""
        weight = self.output_major_weight(name)
        if wants_input_major(weight):
            if weight.stride(1) != 1:
                ordered = weight.transpose(1, 2).contiguous()
                parameter.data = ordered if self.is_transposed else ordered.transpose(1, 2)  # type: ignore[attr-defined]
        elif not parameter.is_contiguous():  # back from a GPU
            parameter.data = parameter.data.contiguous()

    def _make_operands(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        """The biases with folded modes, the thresholds and the modes, as the operation takes them."""
        experts: int = self.num_experts  # type: ignore[attr-defined]
        layers = self.scap_layers()
        thresholds, modes = torch.full((3, experts), -1.0), torch.zeros(3, experts)
        for number, name in enumerate(("gate", "up", "down")):
            for expert in range(experts):
                layer = layers.get(name) or layers.get(f"{expert}.{name}")
                if layer is not None:
                    thresholds[number, expert], modes[number, expert] = layer.scap_threshold, layer.scap_mode
        thresholds, modes = thresholds.to(device), modes.to(device)
        half = self.output_major_weight(first_name(self)).shape[1] // 2
        first = self._folded(first_name(self), modes[:2].t().repeat_interleave(half, dim=1))
        return first, self._folded("down_proj", modes[2, :, None]), thresholds, modes

    def _folded(self, name: str, modes: Tensor) -> Tensor | None:
        """b + m * W·1 in float32, `[experts, out_features]`, of modes of that shape; None if it is nothing."""
        bias = self._parameters[f"{name}_bias"] if self.has_bias else None  # type: ignore[attr-defined]
        if not bool(modes.any()):
            return None if bias is None else bias.float()
        sums = self.output_major_weight(name).sum(dim=2, dtype=torch.float32)
        return modes * sums if bias is None else bias.float() + modes * sums

    def _versions(self) -> tuple[int, ...]:
        """Changes whenever weights are changed in place; of what is folded alone."""
        if self._scap_operands is None or self._scap_operands[0] is None and self._scap_operands[1] is None:
            return ()
        return tuple(version(value) for value in self._parameters.values())  # type: ignore[attr-defined]

    def _can_run_sparse(self, x: Tensor, layers: dict[str, Any]) -> bool:
        """Whether the operation can run on the few rows of `x` `[tokens, hidden]`."""
        rows = x.shape[0]
        if type(rows) is not int or not 0 < rows <= MAX_SPARSE_ROWS or self._scap_operands is None:
            return False
        if rows > 1 and any(layer.scap_apply_to == "decode" for layer in layers.values()):
            return False
        if not all(may_call_kernel(x, self._parameters[name]) for name in (first_name(self), "down_proj")):  # type: ignore[attr-defined]
            return False
        if not torch.compiler.is_compiling():
            if not all(map(is_plain, layers.values())):  # somebody looks at the inputs
                return False
            if self._scap_versions != self._versions():
                self.prepare()
        return True

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        self.prepare()
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        self.prepare()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for name in (first_name(self), "down_proj"):
            if not keep_vars and f"{prefix}{name}" in destination:  # safetensors takes no other order
                destination[f"{prefix}{name}"] = contiguous(destination[f"{prefix}{name}"])

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
