"""Which way a forward of pruned layers takes: the one place that decides it, for single layers and for blocks.

TRACED   torch.jit.trace records the operations of an OpenVINO IR: Abs -> LessEqual -> Select -> MatMul
SPARSE   few rows: the sparse operation, which reads the weights of kept channels alone
PRUNED   many rows, training, autocast, torch.export: an ordinary product behind an elementwise operation
DENSE    a forward of several tokens, or of many sequences, where only decode is pruned
"""

from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..core.config import MOST_DECODED_SEQUENCES


# Rows of activations that the sparse operation takes.
MAX_SPARSE_ROWS = 8


class Way(Enum):
    TRACED = "traced"
    SPARSE = "sparse"
    PRUNED = "pruned"
    DENSE = "dense"


def way_of(x: Tensor, *layers: Any) -> Way:
    """The way that pruned `layers` take together with the input `x` `[..., in_features]`."""
    # Many tokens are sorted out first: prefill waits for Python. A recorded size is no int.
    size = x.numel()
    if type(size) is not int or size <= MAX_SPARSE_ROWS * x.shape[-1]:
        if is_recorded():
            # Before anything depends on the number of rows: an exported program is to serve any.
            if torch.jit.is_tracing():  # type: ignore[attr-defined]
                return Way.TRACED
        elif all(layer.can_run_sparse(x) for layer in layers):
            return Way.SPARSE
    return Way.DENSE if any(layer.runs_dense(x) for layer in layers) else Way.PRUNED


def may_call_kernel(x: Tensor, weight: Any) -> bool:
    """Whether an operation of ours, which knows neither autocast nor gradients, may compute `weight` times `x`.

    `weight` is a tensor, or a layer over integer weights, which has a device, and serves activations of any type.
    """
    is_tensor = isinstance(weight, Tensor)
    if is_tensor and x.dtype != weight.dtype or x.device != weight.device:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or is_tensor and weight.requires_grad))


def is_one_row(x: Tensor) -> bool:
    """Whether `x` `[..., in_features]` is known to be one row; a recorded size is not known."""
    size = x.numel()
    return type(size) is int and size == x.shape[-1] and not is_recorded()


def decodes(x: Tensor) -> bool:
    """Whether `x` `[..., tokens, channels]` is pruned where decoding alone is: one token each of few sequences."""
    return x.dim() < 2 or x.shape[-2] == 1 and x.numel() <= MOST_DECODED_SEQUENCES * x.shape[-1]


def is_recorded() -> bool:
    """Whether operations are being recorded for a program to export, by torch.jit.trace or torch.export."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    # Under torch.compile is_exporting() is true in some versions of torch.
    return not torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting()
