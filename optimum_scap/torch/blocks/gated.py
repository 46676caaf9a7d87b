"""Gated feed-forward blocks, `down(act(gate(x)) * up(x))`, whose gate and up run as one operation at decode.

The block is recognized by what its forward does, not by its name or those of its layers: the forward is traced
symbolically, and what it computes is compared with the formula. Forwards over many tokens go through the block's own
code, with one pruned input for both.
"""

import operator
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..dispatch import Way, is_recorded, way_of
from ..kernels import ACTIVATIONS, sparse_gated_linear
from ..linear import TOGETHER, run_together
from .base import Block
from .shared_input import prune_alike


class _Formula(NamedTuple):
    """Names of a block's children, and its activation."""

    gate: str
    up: str
    down: str
    activation: str


class GatedBlock(Block):
    """A module that computes `down(act(gate(x)) * up(x))`, gate and up being pruned."""

    def matches(self, block: nn.Module, names: tuple[str, ...]) -> bool:
        layers = [getattr(block, name) for name in names]
        if type(layers[0]) not in TOGETHER or not run_together(layers):
            return False
        formula = formula_of(block)
        return formula is not None and {formula.gate, formula.up} == set(names)

    def convert(self, block: nn.Module, names: tuple[str, ...]) -> None:
        formula = formula_of(block)
        assert formula is not None  # it matches
        cls: Any = type(block)
        block.__class__ = _fused_class(cls)
        block.scap_formula = formula  # type: ignore[assignment]
        block.scap_prune_alike = prune_alike([getattr(block, name) for name in names])  # type: ignore[assignment]


_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = ACTIVATIONS | {
    "silu": lambda x: F.silu(x, inplace=True),
    "relu": torch.relu_,
}


class _GatedForward:
    """What a fused block adds to the class of the block."""

    scap_formula: _Formula
    scap_prune_alike: bool

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if is_recorded() or len(args) + len(kwargs) != 1:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        layers: Any = self._modules  # type: ignore[attr-defined]
        formula = self.scap_formula
        gate, up = layers[formula.gate], layers[formula.up]
        # An adapter may have taken a layer's place since.
        if type(gate) not in TOGETHER or type(up) is not type(gate):
            return super().forward(x)  # type: ignore[misc]
        way = way_of(x, gate, up)
        if way is Way.PRUNED and is_plain(gate) and is_plain(up):
            return self._forward_many(x, gate, up, layers[formula.down])
        if way is not Way.SPARSE:
            return super().forward(x)  # type: ignore[misc]
        hidden = sparse_gated_linear(
            x,
            gate.kernel_weights(),
            up.kernel_weights(),
            gate.kernel_bias(),
            up.kernel_bias(),
            gate_threshold=gate.scap_threshold,
            up_threshold=up.scap_threshold,
            gate_mode=gate.scap_mode,
            up_mode=up.scap_mode,
            gate_scale=gate.scap_scale,
            up_scale=up.scap_scale,
            activation=formula.activation,
        )
        return layers[formula.down](hidden)

    def _forward_many(self, x: Tensor, gate: Any, up: Any, down: Any) -> Tensor:
        """Prunes the input once for both if it can. Few launches, little Python: that is what prefill waits for."""
        activation = self.scap_formula.activation
        pruned = gate.pruned_input(x)
        gated = gate.multiply(pruned, gate.pruned_bias())
        linear = up.multiply(pruned if self.scap_prune_alike else up.pruned_input(x), up.pruned_bias())
        if torch.is_grad_enabled() or not _zeroes_small_values(down, gated):
            return down(ACTIVATIONS[activation](gated) * linear)
        # In the memory of `gated`: an operation that allocates takes the host half as long again.
        hidden = _IN_PLACE[activation](gated).mul_(linear)
        torch.hardshrink(hidden, down.scap_shrinkage, out=hidden)
        return down.multiply(hidden, down.pruned_bias())

    def __reduce_ex__(self, _protocol: Any) -> Any:
        """The class is made at run time: pickle and deepcopy make it anew from the block's own."""
        reduced: Any = super().__reduce_ex__(2)
        return (_new_fused, type(self).__bases__[1:], *reduced[2:])


def _zeroes_small_values(down: Any, hidden: Tensor) -> bool:
    """Whether all that `down` does with `hidden` is to multiply what is left when small values become zeros."""
    return type(down) in TOGETHER and is_plain(down) and down.prunes_to_zero(hidden) and not down.runs_dense(hidden)


def is_plain(layer: nn.Module) -> bool:
    """Whether calling `layer` does nothing but its forward: no hooks, and no forward of accelerate's."""
    return not layer._forward_pre_hooks and not layer._forward_hooks and "forward" not in layer.__dict__


def _new_fused(cls: type) -> Any:
    fused = _fused_class(cls)
    return fused.__new__(fused)


@cache
def _fused_class(cls: type) -> Any:
    return type(cls.__name__, (_GatedForward, cls), {"__module__": cls.__module__})


class _Tracer(fx.Tracer):
    """Records calls of the block's children, whatever they are, and nothing inside of them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def formula_of(block: nn.Module) -> _Formula | None:
    """What the forward of `block` computes, if that is `down(act(gate(x)) * up(x))`; else None."""
    if not 3 <= len(block._modules) <= 16:
        return None
    try:
        graph = _Tracer().trace(block)
    except Exception:  # whatever depends on values, shapes or types cannot be traced
        return None
    nodes: list[Any] = [node for node in graph.nodes if node.op != "get_attr"]
    # x, gate, activation, up, product, down, output; in some order, and nothing else
    if len(nodes) != 7 or [node.op for node in nodes].count("placeholder") != 1 or nodes[0].op != "placeholder":
        return None
    x, down = nodes[0], nodes[-1].args[0]
    if not _is_child(down) or not _is_product(product := down.args[0]):
        return None
    for activated, up in (product.args, product.args[::-1]):
        activation = _activation_of(block, activated)
        if activation is None or not _is_child(gate := activated.args[0]) or not _is_child(up):
            continue
        names = [node.target for node in (gate, up, down)]
        if gate.args == up.args == (x,) and len(set(names)) == 3:
            return _Formula(names[0], names[1], names[2], activation)
    return None


def _is_child(node: Any) -> bool:
    """Whether `node` calls a child of the block with one argument."""
    is_call = isinstance(node, fx.Node) and node.op == "call_module"
    return is_call and "." not in node.target and len(node.args) == 1 and not node.kwargs


def _is_product(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in (operator.mul, torch.mul, "mul") and len(node.args) == 2


def _activation_of(block: nn.Module, node: Any) -> str | None:
    """The name of the activation that `node` applies to its one argument."""
    if not isinstance(node, fx.Node) or len(node.args) != 1:
        return None
    if node.op == "call_module":
        return activation_name(block.get_submodule(str(node.target))) if not node.kwargs else None
    if node.target is F.gelu:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(node.kwargs.get("approximate", "none")))
    functions: dict[Any, str] = {F.silu: "silu", F.relu: "relu", torch.relu: "relu"}
    return functions.get(node.target) if node.op == "call_function" else None


def activation_name(function: Any) -> str | None:
    """The name that `kernels.ACTIVATIONS` has for a function or a module; None if it has none."""
    if isinstance(function, nn.GELU):
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    names = {
        "SiLU": "silu",
        "SiLUActivation": "silu",
        "GELUActivation": "gelu",
        "GELUTanh": "gelu_tanh",
        "PytorchGELUTanh": "gelu_tanh",
        "ReLU": "relu",
    }
    return names.get(type(function).__name__)
