"""Gated feed-forward blocks, `down(act(gate(x)) * up(x))`, whose gate and up run as one operation at decode.

The block is recognised by what its forward does, not by its name: the same bytecode as LlamaMLP's, which Mistral,
Qwen, Gemma and many more share. Forwards over many tokens go through the block's own code, with
one pruned input for both.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import ACTIVATIONS, sparse_gated_linear
from ..linear import MAX_SPARSE_ROWS, SCAPLinear, is_recorded
from .shared_input import prune_alike


_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = ACTIVATIONS | {
    "silu": lambda x: F.silu(x, inplace=True),
    "relu": torch.relu_,
}


class _GatedForward:
    """What a fused block adds to the class of the block."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any
    scap_activation: str
    scap_prune_alike: bool

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if is_recorded():
            return super().forward(x)  # type: ignore[misc]
        layers: Any = self._modules  # type: ignore[attr-defined]
        gate, up = layers["gate_proj"], layers["up_proj"]
        # An adapter may have taken a layer's place since.
        if type(gate) is not SCAPLinear or type(up) is not SCAPLinear:
            return super().forward(x)  # type: ignore[misc]
        if x.numel() > MAX_SPARSE_ROWS * x.shape[-1] or not (gate.runs_sparse(x) and up.runs_sparse(x)):
            return self._forward_many(x, gate, up)
        hidden = sparse_gated_linear(
            x,
            gate.weight,
            up.weight,
            gate.kernel_bias(),
            up.kernel_bias(),
            gate_threshold=gate.scap_threshold,
            up_threshold=up.scap_threshold,
            gate_mode=gate.scap_mode,
            up_mode=up.scap_mode,
            activation=self.scap_activation,
        )
        return self.down_proj(hidden)

    def _forward_many(self, x: Tensor, gate: Any, up: Any) -> Tensor:
        """Prunes the input once for both if it can. Few launches, little Python: that is what prefill waits for."""
        if gate.runs_dense(x) or up.runs_dense(x) or not (_is_plain(gate) and _is_plain(up)):
            return super().forward(x)  # type: ignore[misc]
        pruned = gate.pruned_input(x)
        gated = F.linear(pruned, gate.weight, gate.bias)
        linear = F.linear(pruned if self.scap_prune_alike else up.pruned_input(x), up.weight, up.bias)
        down: Any = self._modules["down_proj"]  # type: ignore[attr-defined]
        if torch.is_grad_enabled() or not _zeroes_small_values(down, gated):
            return self.down_proj(ACTIVATIONS[self.scap_activation](gated) * linear)
        # In the memory of `gated`: an operation that allocates takes the host half as long again.
        hidden = _IN_PLACE[self.scap_activation](gated).mul_(linear)
        torch.hardshrink(hidden, down.scap_shrinkage, out=hidden)
        return F.linear(hidden, down.weight, down.bias)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        """The class is made at run time: pickle and deepcopy make it anew from the block's own."""
        reduced: Any = super().__reduce_ex__(2)
        return (_new_fused, type(self).__bases__[1:], *reduced[2:])


def fuse_gated_blocks(model: nn.Module) -> None:
    """Lets every gated block of `model` whose gate and up are pruned run them as one operation, in place."""
    for module in list(model.modules()):
        if not _is_gated_block(module) or isinstance(module, _GatedForward):
            continue
        activation = _activation_name(module.act_fn)
        if activation is not None and all(type(layer) is SCAPLinear for layer in (module.gate_proj, module.up_proj)):
            cls: Any = type(module)
            module.__class__ = _fused_class(cls)
            module.scap_activation = activation  # type: ignore[assignment]
            module.scap_prune_alike = prune_alike([module.gate_proj, module.up_proj])  # type: ignore[assignment]


def _zeroes_small_values(down: Any, hidden: Tensor) -> bool:
    """Whether all that `down` does with `hidden` is to multiply what is left when small values become zeros."""
    return type(down) is SCAPLinear and _is_plain(down) and down.prunes_to_zero(hidden) and not down.runs_dense(hidden)


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling `layer` does nothing but its forward: no hooks, and no forward of accelerate's."""
    return not layer._forward_pre_hooks and not layer._forward_hooks and "forward" not in layer.__dict__


def _new_fused(cls: type) -> Any:
    fused = _fused_class(cls)
    return fused.__new__(fused)


@cache
def _fused_class(cls: type) -> Any:
    return type(cls.__name__, (_GatedForward, cls), {"__module__": cls.__module__})


def _is_gated_block(module: nn.Module) -> bool:
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    # accelerate's hooks replace the forward of an instance, and call what they found there
    if "forward" in vars(module):
        return False
    try:
        from transformers.models.llama.modeling_llama import LlamaMLP
    except ImportError:
        return False
    code, known = getattr(type(module).forward, "__code__", None), LlamaMLP.forward.__code__
    return code is not None and code.co_code == known.co_code and code.co_names == known.co_names


def _activation_name(function: Any) -> str | None:
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
