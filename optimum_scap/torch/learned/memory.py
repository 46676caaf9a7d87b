"""Activations that autograd keeps, and computing them again where memory is short."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..prunable import in_features, is_fully_connected, out_features
from ..quantized import QuantizedLinear
from .layers import LearnedLayers, replaced_forward


# What autograd keeps, by the channels that enter and leave the fully connected layers.
_KEPT = 3
_SHARE_OF_MEMORY = 1 / 4


@contextmanager
def checkpointed(model: nn.Module, layers: LearnedLayers, tokens: int) -> Iterator[None]:
    """A context in which decoder blocks compute their activations again for gradients, where memory matters.

    Args:
        model: the model.
        layers: its layers.
        tokens: of a pass.
    """
    with ExitStack() as stack:
        if _needs_checkpoints(model, tokens):
            for block in decoder_blocks(model, layers):
                stack.enter_context(replaced_forward(block, _checkpoint(block.forward)))
        yield


def _checkpoint(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def _needs_checkpoints(model: nn.Module, tokens: int) -> bool:
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        return True  # autograd would keep their weights as floats
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type == "cpu":
        return True  # fresh memory costs more than computing again: 43 s a pass of SmolLM2 instead of 13 s
    layers = [module for module in model.modules() if is_fully_connected(module)]
    channels = sum(in_features(layer) + out_features(layer) for layer in layers)
    size = next(parameter.element_size() for parameter in model.parameters())
    free = available_bytes(device)
    return free is None or _KEPT * tokens * size * channels > _SHARE_OF_MEMORY * free


def decoder_blocks(model: nn.Module, layers: LearnedLayers) -> list[nn.Module]:
    """The outermost elements of lists of modules that hold pruned layers."""
    pruned = set(layers.modules.values())
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            blocks = [block for block in module if not pruned.isdisjoint(block.modules())]
            found += blocks
            inside.update(*(block.modules() for block in blocks))
    return found


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free on `device`; None if that is not known."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    return None
