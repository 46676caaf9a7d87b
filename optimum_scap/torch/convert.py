"""Turns the class of an existing fully connected layer into one whose input is pruned."""

import types
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.config import ApplyTo
from ..core.criterion import Criterion
from ..core.parameters import LayerParameters
from ..errors import SCAPError
from .blocks.experts import convert_experts
from .expert_layers import ExpertLayer
from .linear import VECTORS, SCAPLinear, SCAPQuantizedLinear, is_pruned, scap_conv1d_class
from .prunable import in_features, is_fully_connected, out_features, why_dense
from .quantized import QuantizedLinear


def convert(
    module: nn.Module,
    parameters: LayerParameters,
    apply_to: ApplyTo,
    criterion: Criterion | None = None,
    bias_correction: Any = None,
) -> None:
    """Makes a fully connected layer prune its input activations, in place.

    The module stays the same object, with its parameters, hooks (accelerate's offloading among them) and place in the
    model; only its class changes.

    Args:
        module: the layer.
        parameters: its parameters.
        apply_to: which forwards are pruned.
        criterion: with the scale, if the parameters have one. Without it room is made for what a checkpoint holds.
        bias_correction: float32 `[out_features]`, if the parameters have one.

    Raises:
        SCAPError: if `module` is no layer that can be pruned, or is pruned already, or a vector does not fit it.
    """
    if is_pruned(module):
        raise SCAPError("the layer is pruned already")
    if isinstance(module, ExpertLayer):
        convert_experts(module, parameters, apply_to)
        return
    if not is_fully_connected(module):
        reason = why_dense(module) or "it is no fully connected layer"
        raise SCAPError(f"a {type(module).__name__} cannot be pruned: {reason}")
    cls: Any = scap_conv1d_class()
    if isinstance(module, QuantizedLinear):
        cls = SCAPQuantizedLinear
    elif isinstance(module, nn.Linear):
        cls = SCAPLinear
    vectors = {
        "scale": _vector(module, 1, criterion.scale if criterion else None, "scale", parameters),
        "bias_correction": _vector(module, 0, bias_correction, "bias_correction", parameters),
    }
    module.__class__ = cls
    module.scap_parameters = parameters  # type: ignore[assignment]
    module.scap_apply_to = apply_to  # type: ignore[assignment]
    module.scap_mode = parameters.mode  # type: ignore[assignment]
    module.scap_threshold = parameters.threshold  # type: ignore[assignment]
    module._scap_folds = parameters.mode != 0.0 or vectors["bias_correction"] is not None  # type: ignore[assignment]
    for name, vector in vectors.items():
        # torch.export miscounts buffers that are None.
        if vector is None:
            setattr(module, VECTORS[name], None)
        else:
            module.register_buffer(VECTORS[name], vector)
    module.register_buffer("scap_folded_bias", None, persistent=False)
    if hasattr(module, "_old_forward"):  # accelerate calls what it found when its hook was added
        module._old_forward = types.MethodType(cls.forward, module)  # type: ignore[assignment]
    elif "forward" in vars(module):  # the class's own, which accelerate leaves behind when its hook is removed
        del module.forward
    module.prepare()  # type: ignore[operator]


def check_vectors(module: nn.Module, criterion: Criterion, bias_correction: Any) -> str | None:
    """Why the vectors of a layer's parameters do not fit it; None if they do."""
    for name, value, dimension in (("scale", criterion.scale, 1), ("bias_correction", bias_correction, 0)):
        wanted = _features(module, dimension)
        if value is not None and value.shape != (wanted,):
            return (
                f"its {name} has {value.shape[0]} values, the layer {wanted} {('output', 'input')[dimension]} channels"
            )
    return None


def _vector(module: nn.Module, dimension: int, value: Any, name: str, parameters: LayerParameters) -> Tensor | None:
    """A vector of the parameters for the layer, or room for one that a checkpoint holds; None if there is none."""
    if value is not None:
        return torch.tensor(np.asarray(value, dtype=np.float32), device=_device(module))
    if name not in parameters.tensors:
        return None
    return torch.empty(_features(module, dimension), dtype=torch.float32, device=_stored_on(module))


def _device(module: nn.Module) -> torch.device:
    """Where the layer computes; accelerate may keep its weights elsewhere meanwhile."""
    device = _stored_on(module)
    if device.type != "meta":
        return device
    return torch.device(getattr(getattr(module, "_hf_hook", None), "execution_device", None) or "cpu")


def _stored_on(module: nn.Module) -> torch.device:
    place: Any = module if isinstance(module, QuantizedLinear) else module.weight
    return place.device


def _features(module: nn.Module, dimension: int) -> int:
    return in_features(module) if dimension == 1 else out_features(module)
