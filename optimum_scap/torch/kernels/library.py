"""The kernels as torch operations: opaque to torch.compile, captured by CUDA graphs, dispatched by device.

Weights are passed as the tensors of a format of `torch.weights` and the name of that format.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..weights import find_format
from . import reference


logger = logging.getLogger(__name__)

NAMESPACE = "optimum_scap"
# Older ones compile neither tuples of tensors nor programmatic dependent launch as the kernels use them.
MIN_TRITON = (3, 5)
_library = torch.library.Library(NAMESPACE, "DEF")
# What operations are on a GPU.
_on_gpu: dict[Callable[..., Any], Callable[..., Any]] = {}


def register_operation(
    name: str, signature: str, twin: Callable[..., Any], shapes: Callable[..., Any], module: str = "launch"
) -> Callable[..., Any]:
    """Registers `optimum_scap::name` and returns it.

    Args:
        name: of the operation, of its twin, and of the function that computes it on a GPU.
        signature: arguments and results in the schema language of torch.library.
        twin: computes it in plain torch, on any device without a kernel.
        shapes: computes outputs of the right shape and type, for tracing.
        module: where the function is, if not in `launch`.
    """
    _library.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))

    @cache
    def kernel() -> Callable[..., Any]:
        return getattr(import_module(f"{__package__}.{module}"), name)  # which imports Triton

    @wraps(twin)
    def on_gpu(*args: Any) -> Any:
        return kernel()(*args) if triton_is_there() else twin(*args)

    qualified = f"{NAMESPACE}::{name}"
    _library.impl(name, twin, "CompositeExplicitAutograd")
    _library.impl(name, on_gpu, "CUDA")
    torch.library.register_fake(qualified, shapes, lib=_library)
    torch.library.register_autograd(qualified, _refuse_backward, lib=_library)
    operation = getattr(getattr(torch.ops, NAMESPACE), name).default
    _on_gpu[operation] = on_gpu
    return operation


def run(operation: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """Calls an operation that `register_operation` returned; on a GPU without torch's dispatcher, if nobody listens.

    The dispatcher calls what is registered in Python after 25 us, while the GPU waits.
    """
    if may_skip_dispatcher(x):
        return _on_gpu[operation](x, *args)
    return operation(x, *args)


def may_skip_dispatcher(x: Tensor) -> bool:
    """Whether an operation over `x` may be called as the plain function that it is.

    Not if something records or changes operations: a compiler, a tracer, gradients, transformations of torch.func,
    modes such as FakeTensorMode, subclasses of tensors.
    """
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and x.is_cuda
        and not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    )


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


def _like(x: Tensor, weights: Sequence[Tensor], format: str, *_: Any) -> list[Tensor]:
    weight_format = find_format(format)
    return [x.new_empty((*x.shape[:-1], weight_format.shape(layer)[0])) for layer in weight_format.layers(weights)]


def _like_one(x: Tensor, weights: Sequence[Tensor], format: str, *_: Any) -> Tensor:
    return _like(x, weights, format)[0]


sparse_linear = register_operation(
    "sparse_linear",
    "(Tensor x, Tensor[] weights, str format, Tensor? bias, float threshold, float mode, Tensor? scale) -> Tensor",
    reference.sparse_linear,
    _like_one,
)
sparse_linear_group = register_operation(
    "sparse_linear_group",
    "(Tensor x, Tensor[] weights, str format, Tensor?[] biases, float[] thresholds, float[] modes, Tensor?[] scales) "
    "-> Tensor[]",
    reference.sparse_linear_group,
    _like,
)
linear_group = register_operation(
    "linear_group",
    "(Tensor x, Tensor[] weights, str format, Tensor?[] biases) -> Tensor[]",
    reference.linear_group,
    _like,
)
sparse_gated_linear = register_operation(
    "sparse_gated_linear",
    "(Tensor x, Tensor[] gate_weights, Tensor[] up_weights, str format, Tensor? gate_bias, Tensor? up_bias, "
    "float gate_threshold, float up_threshold, float gate_mode, float up_mode, Tensor? gate_scale, Tensor? up_scale, "
    "str activation) -> Tensor",
    reference.sparse_gated_linear,
    lambda x, gate_weights, _, format, *__: _like_one(x, gate_weights, format),
)
integer_linear = register_operation(
    "integer_linear",
    "(Tensor x, Tensor[] weights, str format, Tensor? bias) -> Tensor",
    reference.integer_linear,
    _like_one,
)
sparse_experts = register_operation(
    "sparse_experts",
    "(Tensor x, Tensor chosen, Tensor routing, Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias, "
    "Tensor thresholds, Tensor modes, str activation) -> Tensor",
    reference.sparse_experts,
    lambda x, *_: torch.empty_like(x),
    "launch_experts",
)
prune_input = register_operation(
    "prune_input",
    "(Tensor x, float threshold, float mode, Tensor? scale) -> Tensor",
    reference.prune_input,
    lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    "launch_pruning",
)
