"""Which modules can be pruned: those that compute `x W^T + b` with ordinary weights of their own, and nothing else.

A layer is judged by what it is and computes. Its class and the type of its weights alone say too little: an FP8 layer
of transformers is an nn.Linear whose weights are floats, and means nothing without the scales beside them.
"""

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import SCAPError
from .quantized import QuantizedLinear
from .readers import adopted
from .weights.integers import dequantize


_WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_fully_connected(module: nn.Module) -> bool:
    """Whether `module` is a layer that can be pruned: nn.Linear or Conv1D with floating-point weights of its own, or a
    layer over integer weights, of ours or of a library whose layers `readers` knows.
    """
    return (is_linear(module) or is_quantized(module)) and why_dense(module) is None


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` is a fully connected layer over integer weights that can be read."""
    if isinstance(module, QuantizedLinear):
        return True
    try:
        return adopted(module, "") is not None
    except SCAPError:
        return False


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is an nn.Linear or a Conv1D of transformers, of whatever weights and forward."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is a Conv1D of transformers, whose weights are `[in_features, out_features]`."""
    # Where transformers was never imported nothing can be one of its layers.
    cls = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return cls is not None and isinstance(module, cls)


def in_features(module: nn.Module) -> int:
    """Number of input channels of a fully connected layer."""
    if not _has_plain_weight(module):
        return module.in_features  # type: ignore[return-value]
    assert isinstance(module.weight, Tensor)
    return module.weight.shape[1 if isinstance(module, nn.Linear) else 0]


def out_features(module: nn.Module) -> int:
    """Number of output channels of a fully connected layer."""
    if not _has_plain_weight(module):
        return module.out_features  # type: ignore[return-value]
    assert isinstance(module.weight, Tensor)
    return module.weight.shape[0 if isinstance(module, nn.Linear) else 1]


def why_dense(module: nn.Module) -> str | None:
    """Why a module that is an nn.Linear or Conv1D cannot be pruned; None if it can be, or is of another kind."""
    if isinstance(module, QuantizedLinear):
        return None
    try:
        if adopted(module, "") is not None:
            return None
    except SCAPError as error:
        return f"its weights are quantized ({str(error).removeprefix('layer : ')})"
    if not is_linear(module):
        return None
    return _why_not_ordinary_weights(module) or _why_not_linear(module)


def weights_of(module: nn.Module) -> Tensor | None:
    """The weights of a fully connected layer, `[out_features, in_features]`, floating-point; None if not there."""
    if isinstance(module, QuantizedLinear):
        return module.dequantized()
    found = adopted(module, "")
    if found is not None:
        return dequantize(found.storage.read(found.tensors))
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        return None
    return weight if isinstance(module, nn.Linear) else weight.t()


def _has_plain_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    # Integers may stand packed there, in another shape.
    return weight is not None and weight.dim() == 2 and type(weight) is nn.Parameter and weight.is_floating_point()


def _why_not_ordinary_weights(module: nn.Module) -> str | None:
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weights past its forward"
    weight = module._parameters.get("weight")
    if isinstance(weight, nn.UninitializedParameter):
        return "its weights are made by its first forward: run the model once"
    if getattr(module, "quantization_scheme", None) is not None:  # of compressed-tensors
        return f"its weights are quantized ({_beside_the_weights(module) or 'a quantization_scheme'})"
    if weight is None:
        beside = _beside_the_weights(module)
        return f"its weights are computed from others ({beside or 'a parametrization or weight norm'})"
    if type(weight) is not nn.Parameter:
        kind = type(weight).__name__
        return f"its weights are distributed ({kind})" if kind == "DTensor" else f"its weights are quantized ({kind})"
    if weight.dtype not in _WEIGHT_DTYPES:
        return f"its weights are quantized ({str(weight.dtype).removeprefix('torch.')})"
    if weight.dim() != 2:
        return "its weights are not two-dimensional"
    return None


def _why_not_linear(module: nn.Module) -> str | None:
    cls: Any = type(module)
    # accelerate replaces it too, and keeps what it found, see `convert`.
    forward = vars(module).get("_old_forward", vars(module).get("forward"))
    if forward is not None and getattr(forward, "__func__", None) is not cls.forward:
        return "its forward was replaced"
    base: Any = nn.Linear if isinstance(module, nn.Linear) else sys.modules["transformers.pytorch_utils"].Conv1D
    if cls.forward is base.forward:
        return None
    # What a forward of its own makes of them is not seen on a layer that has none.
    beside = _beside_the_weights(module)
    if beside:
        return f"it holds more than weights and a bias ({beside})"
    if base is nn.Linear and _computes_linear(cls):
        return None
    return f"the forward of {cls.__name__} is not that of {'nn.Linear' if base is nn.Linear else 'Conv1D'}"


def _beside_the_weights(module: nn.Module) -> str:
    """Names of the parameters and buffers of `module` that a fully connected layer does not have."""
    tensors = {**module._parameters, **module._buffers}
    return ", ".join(name for name, value in tensors.items() if value is not None and name not in ("weight", "bias"))


@cache
def _computes_linear(cls: Any) -> bool:
    """Whether a class derived from nn.Linear computes just that; Falcon's does, one that scales its output not."""
    weight, bias, x = (torch.arange(1.0, 1.0 + n, dtype=torch.float32, device="cpu") for n in (6, 2, 12))
    try:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = 3, 2
        layer.weight, layer.bias = nn.Parameter(weight.view(2, 3)), nn.Parameter(bias)
        with torch.no_grad():
            output: Tensor = layer(x.view(4, 3))
            return torch.equal(output, F.linear(x.view(4, 3), layer.weight, layer.bias))
    except Exception:  # it needs more than a linear layer has
        return False
