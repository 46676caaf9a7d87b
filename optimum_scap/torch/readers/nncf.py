"""Models whose weights `nncf.compress_weights` compressed in memory.

NNCF leaves integers in the place of the weights, and decompresses them by functions that it hooks behind the reading
of a parameter: INT8 `[out, in]` with scales `[out, 1]`, INT4 two to a byte with scales `[out, groups, 1]`, float16.
There is no checkpoint of its own for transformers models: such a model is saved as compressed-tensors'
`pack-quantized`, with the integers, zero points and scales that NNCF found. Where it compressed an embedding, or a
weight that two layers share, the weights are saved multiplied out.

(nncf/torch/quantization/layers.py)
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SCAPError
from ..owners import Owners
from ..quantized import Storage, StoredTensor
from ..weights import IntegerWeights
from .base import Adopted, LayerShape, Reader, to_signed
from .compressed_tensors import packed_storage


logger = logging.getLogger(__name__)

_HOOKS = "__nncf_hooks"
# What a layer of such a model is told about the function that decompresses its weights.
_MARK = "_scap_nncf_decompressor"
_NO_CHECKPOINTS = "NNCF has no checkpoints of transformers models"


def compressors(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module, str, nn.Module]]:
    """What NNCF hooked behind parameters: the model, the key of the hook, the module, the parameter, the function."""
    layers = getattr(sys.modules.get("nncf.torch.quantization.layers"), "BaseWeightsDecompressor", None)
    if layers is None:
        return
    for root in model.modules():
        storage = root._modules.get(_HOOKS)
        if storage is None:
            continue
        for key, chain in list(storage.post_hooks._modules.items()):  # type: ignore[union-attr]
            hooks = list(chain.children()) if chain is not None else []
            if len(hooks) != 1 or not isinstance(hooks[0], layers):
                continue
            *path, name = key.rpartition("__")[0].split(":")
            yield root, key, root.get_submodule(".".join(path)), name, hooks[0]


def hooked_by_nncf(model: nn.Module) -> bool:
    """Whether NNCF computes something between the operations of `model`, such as quantizing their inputs; that it
    decompresses weights does not count.
    """
    storages = [module._modules[_HOOKS] for module in model.modules() if _HOOKS in module._modules]
    hooks = sum(len(points) for storage in storages for points in storage.children())  # type: ignore[union-attr,arg-type,misc]
    return hooks > len(list(compressors(model)))


def mark_layers(model: nn.Module) -> None:
    """Tells the layers of a model of NNCF which function decompresses their weights."""
    found = list(compressors(model))
    owners = Owners(model)
    for _, _, module, name, function in found:
        if isinstance(module, nn.Linear) and name == "weight" and owners[module.weight] == 1:
            object.__setattr__(module, _MARK, function)  # no child of the layer


def release(model: nn.Module) -> None:
    """Takes away NNCF's hooks behind weights that were taken over, and multiplies out those that were not."""
    for root, key, module, name, function in list(compressors(model)):
        weight = module._parameters.get(name)
        if weight is not None and not weight.is_floating_point():
            with torch.no_grad():
                plain = nn.Parameter(function(weight), requires_grad=False)
            for other in model.modules():
                for called, value in list(other._parameters.items()):
                    if value is weight:
                        other._parameters[called] = plain
            logger.info("%s: its weights are kept multiplied out", key)
        storage: Any = root._modules[_HOOKS]
        del storage.post_hooks._modules[key]
        if not any(len(points) > 0 for points in storage.children()):
            del root._modules[_HOOKS]
            root.__dict__.pop("forward", None)


class NNCFReader(Reader):
    name = "NNCF"
    methods = ()
    marker = ""

    def check(self, config: Mapping[str, Any]) -> None:
        raise SCAPError(_NO_CHECKPOINTS)

    def storage(
        self,
        config: Mapping[str, Any],
        layer: LayerShape,
        stored: Mapping[str, StoredTensor],
        metadata: Mapping[str, str],
    ) -> Storage:
        raise SCAPError(_NO_CHECKPOINTS)

    def adopt(self, module: nn.Module, path: str) -> Adopted | None:
        function = module.__dict__.get(_MARK)
        if function is None or not isinstance(module, nn.Linear):
            return None
        layer = LayerShape(path, module.in_features, module.out_features)
        weights = _weights(layer, module.weight.detach(), function)
        storage = packed_storage(layer, weights)
        bias: Any = module.bias
        return Adopted(layer, storage, storage.write(weights), bias)


def _weights(layer: LayerShape, weight: Tensor, function: Any) -> IntegerWeights:
    kind = type(function).__name__
    scales = function._scale
    scales = scales.reshape(layer.out_features, -1) if scales.shape[0] == layer.out_features else None
    symmetric = kind in ("INT8SymmetricWeightsDecompressor", "INT4SymmetricWeightsDecompressor")
    if (
        scales is None
        or not symmetric
        and kind
        not in (
            "INT8AsymmetricWeightsDecompressor",
            "INT4AsymmetricWeightsDecompressor",
        )
    ):
        raise SCAPError(f"layer {layer.path}: NNCF's {kind} is not read")
    bits = 4 if kind.startswith("INT4") else 8
    shape = (layer.out_features, layer.in_features)
    zero_points = None if symmetric else function._zero_point
    if bits == 4:
        unsigned = _nibbles(weight).view(shape)
        integers = to_signed(unsigned, bits) if symmetric else unsigned
        zero_points = None if zero_points is None else _nibbles(zero_points).view(scales.shape)
    else:
        integers = weight.view(shape)
        zero_points = None if zero_points is None else zero_points.view(scales.shape)
    return IntegerWeights(bits, integers, scales.contiguous(), zero_points)


def _nibbles(packed: Tensor) -> Tensor:
    flat = packed.flatten()
    return torch.stack([flat & 15, flat >> 4], dim=1).flatten()
