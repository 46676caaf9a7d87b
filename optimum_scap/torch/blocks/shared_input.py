"""Layers over one input that run together: `q`, `k` and `v` of an attention block, `gate` and `up` of a gated one.

A block keeps its own forward. Before it runs, the layers' outputs are computed in one go and left with the layers;
each hands its output out when it is called with that very input, and computes as always when called with another.
At decode that is one launch instead of several, over many tokens the input is pruned once instead of several times.

Attention that is left dense takes part: one launch for one token reads its weights where nn.Linear has them.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from ..dispatch import MAX_SPARSE_ROWS, Way, is_recorded, way_of
from ..given import GivenOutput
from ..kernels import linear_group, sparse_linear_group
from ..linear import TOGETHER, run_together
from ..quantized import QuantizedLinear
from .base import Block
from .dense import DenseLinear


class SharedInputBlock(Block):
    """A module with child layers over its first input."""

    def matches(self, block: nn.Module, names: tuple[str, ...]) -> bool:
        layers: list[Any] = [getattr(block, name) for name in names]
        if type(layers[0]) not in (*TOGETHER, DenseLinear, QuantizedLinear) or not run_together(layers):
            return False
        return len({layer.in_features for layer in layers}) == 1

    def convert(self, block: nn.Module, names: tuple[str, ...]) -> None:
        cls: Any = type(block)
        block.__class__ = _shared_class(cls)
        block.scap_together = names  # type: ignore[assignment]
        layers: list[Any] = [getattr(block, name) for name in names]
        block.scap_prune_alike = prune_alike(layers)  # type: ignore[assignment]
        for layer in layers:
            layer.scap_given = GivenOutput()


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
    if kind in TOGETHER:
        outputs = _pruned_outputs(x, layers, prune_alike)
    elif (
        kind in (DenseLinear, QuantizedLinear)
        and x.numel() == x.shape[-1]
        and all(layer.runs_our_kernel(x) for layer in layers)
    ):
        outputs = linear_group(x, [layer.kernel_weights() for layer in layers], [layer.bias for layer in layers])
    else:
        outputs = None
    if outputs is None:
        return False
    for layer, output in zip(layers, outputs, strict=True):
        layer.scap_given.put(x, output)
    return True


def _pruned_outputs(x: Tensor, layers: Sequence[Any], prune_alike: bool) -> list[Tensor] | None:
    first = layers[0]
    way = way_of(x, *layers)
    if way is Way.SPARSE:
        return sparse_linear_group(
            x,
            [layer.kernel_weights() for layer in layers],
            [layer.kernel_bias() for layer in layers],
            thresholds=[layer.scap_threshold for layer in layers],
            modes=[layer.scap_mode for layer in layers],
            scales=[layer.scap_scale for layer in layers],
        )
    if way is not Way.PRUNED or not prune_alike or first.weights_device() != x.device:
        return None
    pruned = first.pruned_input(x)
    return [layer.multiply(pruned, layer.pruned_bias()) for layer in layers]


def prune_alike(layers: Sequence[Any]) -> bool:
    """Whether all of `layers` prune the same channels of the same input."""
    return all(type(layer) in TOGETHER for layer in layers) and all(
        (layer.scap_mode, layer.scap_threshold, layer.scap_apply_to)
        == (layers[0].scap_mode, layers[0].scap_threshold, layers[0].scap_apply_to)
        and _same_scale(layer.scap_scale, layers[0].scap_scale)
        for layer in layers
    )


def _same_scale(a: Tensor | None, b: Tensor | None) -> bool:
    # On the meta device they are not known yet.
    if a is None or b is None:
        return a is b
    return not a.is_meta and not b.is_meta and a.shape == b.shape and bool((a == b).all())


def _new_block(cls: type) -> Any:
    shared = _shared_class(cls)
    return shared.__new__(shared)


@cache
def _shared_class(cls: type) -> Any:
    return type(cls.__name__, (_SharedInputForward, cls), {"__module__": cls.__module__})
