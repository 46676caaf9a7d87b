"""The kernels as torch operations: opaque to torch.compile, captured by CUDA graphs, dispatched by device.

`register_operation` is the one extension point: a further kind of weights (INT8 per channel, INT4 in groups) is a file
with its kernels, their twins in `reference`, and a call each.
"""

import importlib
import logging
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from . import reference


logger = logging.getLogger(__name__)

NAMESPACE = "optimum_scap"
# Older ones compile neither tuples of tensors nor programmatic dependent launch as the kernels use them.
MIN_TRITON = (3, 5)
_library = torch.library.Library(NAMESPACE, "DEF")


def register_operation(
    name: str, signature: str, twin: Callable[..., Any], shapes: Callable[..., Any], kernel: str
) -> Callable[..., Any]:
    """Registers `optimum_scap::name` and returns it.

    Args:
        name: of the operation, of its twin and of its kernel.
        signature: arguments and results in the schema language of torch.library.
        twin: computes it in plain torch, on any device without a kernel.
        shapes: computes outputs of the right shape and type, for tracing.
        kernel: module of this package whose function `name` computes it with Triton; imported on first use on a GPU.
    """
    _library.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))

    @wraps(twin)
    def on_gpu(*args: Any) -> Any:
        if not triton_is_there():
            return twin(*args)
        return getattr(importlib.import_module(f".{kernel}", __package__), name)(*args)

    qualified = f"{NAMESPACE}::{name}"
    _library.impl(name, twin, "CompositeExplicitAutograd")
    _library.impl(name, on_gpu, "CUDA")
    torch.library.register_fake(qualified, shapes, lib=_library)
    torch.library.register_autograd(qualified, _refuse_backward, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


@cache
def triton_is_there() -> bool:
    """Whether the GPU kernels can run; says once if they cannot."""
    try:
        import triton
    except ImportError:
        found = "it is not installed"
    else:
        if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= MIN_TRITON:
            return True
        found = f"this is {triton.__version__}"
    needed = ".".join(map(str, MIN_TRITON))
    logger.warning("activation sparsity saves no time on this GPU without Triton %s or later; %s", needed, found)
    return False


def _refuse_backward(*_: Any) -> None:
    raise RuntimeError("the sparse kernels compute no gradients; call them under torch.no_grad()")


def _like(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


sparse_linear = register_operation(
    "sparse_linear",
    "(Tensor x, Tensor weight, Tensor? bias, float threshold, float mode) -> Tensor",
    reference.sparse_linear,
    lambda x, weight, *_: _like(x, weight),
    "launch",
)
sparse_linear_group = register_operation(
    "sparse_linear_group",
    "(Tensor x, Tensor[] weights, Tensor?[] biases, float[] thresholds, float[] modes) -> Tensor[]",
    reference.sparse_linear_group,
    lambda x, weights, *_: [_like(x, weight) for weight in weights],
    "launch",
)
linear_group = register_operation(
    "linear_group",
    "(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]",
    reference.linear_group,
    lambda x, weights, *_: [_like(x, weight) for weight in weights],
    "launch",
)
sparse_gated_linear = register_operation(
    "sparse_gated_linear",
    "(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias, Tensor? up_bias, float gate_threshold, "
    "float up_threshold, float gate_mode, float up_mode, str activation) -> Tensor",
    reference.sparse_gated_linear,
    lambda x, gate_weight, *_: _like(x, gate_weight),
    "launch",
)
