"""Layers over one input that run together: `q`, `k` and `v` of an attention block, `gate` and `up` of a gated one.

A block keeps its own forward. Before it runs, the layers' outputs are computed in one go and left with the layers;
each hands its output out when it is called with that very input, and computes as always when called with another.
At decode that is one launch instead of several, over many tokens the input is pruned once instead of several times.

Attention that is left dense takes part: one launch for one token reads its weights where nn.Linear has them.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core.roles import SHARED_INPUTS, find_role
from ..kernels import linear_group, sparse_linear_group
from ..linear import MAX_SPARSE_ROWS, GivenOutput, SCAPLinear, is_recorded


class DenseLinear(nn.Linear):
    """An nn.Linear of a sparse model that is left dense. One token on a GPU goes through a kernel of ours."""

    scap_given: GivenOutput | None = None

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        # Many tokens are sorted out first: prefill waits for Python. A recorded size is no int.
        size = input.numel()
        if type(size) is int and size == self.in_features and not is_recorded():
            given = self.scap_given
            if given is not None and (output := given.take(input)) is not None:
                return output
            if self.runs_our_kernel(input):
                return linear_group(input, [self.weight], [self.bias])[0]
        return F.linear(input, self.weight, self.bias)

    def runs_our_kernel(self, x: Tensor) -> bool:
        """Whether a forward of one token `x` `[..., in_features]` runs the kernel."""
        if not _on_gpu(x) or torch.is_autocast_enabled(x.device.type):
            return False
        weight = self.weight
        if x.dtype != weight.dtype or x.device != weight.device or weight.stride(-1) != 1:
            return False
        return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


class _SharedInputForward:
    """What is added to the class of a block with child layers over its first input."""

    # Names of the layers; where they all prune alike, many tokens are pruned once.
    scap_together: tuple[str, ...]
    scap_prune_alike: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's own."""
        x = args[0] if args else kwargs.get("hidden_states")
        if not self.scap_together or not isinstance(x, Tensor) or not self._is_worth_it(x) or is_recorded():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        layers = [self._modules[name] for name in self.scap_together]  # type: ignore[attr-defined]
        if not give_outputs(x, layers, self.scap_prune_alike):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            untaken = [layer.scap_given.forget() for layer in layers]
            if any(untaken):  # the block calls them with something else, as cross-attention does
                self.scap_together = ()

    def _is_worth_it(self, x: Tensor) -> bool:
        if self.scap_prune_alike:
            return True
        size = x.numel()
        return type(size) is int and size <= MAX_SPARSE_ROWS * x.shape[-1]  # a recorded size is no int

    def __reduce_ex__(self, _protocol: Any) -> Any:
        """The class is made at run time: pickle and deepcopy make it anew from the block's own."""
        reduced: Any = super().__reduce_ex__(2)
        return (_new_block, type(self).__bases__[1:], *reduced[2:])


def give_outputs(x: Tensor, layers: Sequence[Any], prune_alike: bool) -> bool:
    """Computes the outputs of `layers` for `x` together and leaves them with the layers; False if they cannot be."""
    kind = type(layers[0])
    for layer in layers:  # an adapter may have taken a layer's place since
        if type(layer) is not kind or layer.scap_given is None:
            return False
    if x.shape[-1:] != (layers[0].in_features,):
        return False
    if kind is SCAPLinear:
        outputs = _pruned_outputs(x, layers, prune_alike)
    elif kind is DenseLinear and x.numel() == x.shape[-1] and all(layer.runs_our_kernel(x) for layer in layers):
        outputs = linear_group(x, [layer.weight for layer in layers], [layer.bias for layer in layers])
    else:
        outputs = None
    if outputs is None:
        return False
    for layer, output in zip(layers, outputs, strict=True):
        layer.scap_given.put(x, output)
    return True


def _pruned_outputs(x: Tensor, layers: Sequence[Any], prune_alike: bool) -> list[Tensor] | None:
    first = layers[0]
    if x.numel() <= MAX_SPARSE_ROWS * x.shape[-1] and all(layer.runs_sparse(x) for layer in layers):
        return sparse_linear_group(
            x,
            [layer.weight for layer in layers],
            [layer.kernel_bias() for layer in layers],
            thresholds=[layer.scap_threshold for layer in layers],
            modes=[layer.scap_mode for layer in layers],
        )
    if not prune_alike or first.runs_dense(x) or first.weight.device != x.device:
        return None
    pruned = first.pruned_input(x)
    return [F.linear(pruned, layer.weight, layer.bias) for layer in layers]


def prune_alike(layers: Sequence[Any]) -> bool:
    """Whether all of `layers` prune the same channels of the same input."""
    return all(type(layer) is SCAPLinear for layer in layers) and all(
        (layer.scap_mode, layer.scap_threshold, layer.scap_apply_to)
        == (layers[0].scap_mode, layers[0].scap_threshold, layers[0].scap_apply_to)
        for layer in layers
    )


def share_inputs(model: nn.Module) -> None:
    """Has the layers of every block of `model` that share an input run together, in place.

    Of layers that are not pruned, those of a known role become DenseLinear, so that they can take part.
    """
    for path, module in model.named_modules():
        # accelerate's hooks replace the forward of an instance, and call what they found there
        if type(module) is nn.Linear and find_role(path) is not None and "forward" not in vars(module):
            module.__class__ = DenseLinear
    for path, block in list(model.named_modules()):
        # `scap_activation`: a gated block that does it by itself
        if "forward" in vars(block) or hasattr(block, "scap_together") or hasattr(block, "scap_activation"):
            continue
        together = _layers_over_one_input(path, block)
        if together:
            cls: Any = type(block)
            block.__class__ = _shared_class(cls)
            block.scap_together = together
            layers: list[Any] = [getattr(block, name) for name in together]
            block.scap_prune_alike = prune_alike(layers)
            for layer in layers:
                layer.scap_given = GivenOutput()


def _layers_over_one_input(path: str, block: nn.Module) -> tuple[str, ...]:
    """Names of children of `block` that can run together: its q, k and v, or its gate and up; () if there are none."""
    by_role: dict[str | None, list[str]] = {}
    for name, child in block.named_children():
        if type(child) in (SCAPLinear, DenseLinear):
            by_role.setdefault(find_role(f"{path}.{name}"), []).append(name)
    for roles in SHARED_INPUTS:
        found = [by_role.get(role, []) for role in roles]
        if all(len(names) == 1 for names in found):
            names = tuple(names[0] for names in found)
            layers = [getattr(block, name) for name in names]
            if len({type(layer) for layer in layers}) == 1 and len({layer.in_features for layer in layers}) == 1:
                return names
    return ()


def _new_block(cls: type) -> Any:
    shared = _shared_class(cls)
    return shared.__new__(shared)


@cache
def _shared_class(cls: type) -> Any:
    return type(cls.__name__, (_SharedInputForward, cls), {"__module__": cls.__module__})


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda
