"""torchao's weight-only checkpoints, as transformers saves them: a tensor subclass is one tensor per attribute.

    _weight_qdata       [out, in] int8
    _weight_scale       [out, groups]
    _weight_zero_point  [out, groups] int8

    w = (q - zero_point) * scale

The file's metadata name the subclass: `Int8Tensor`, or `IntxUnpackedToInt8Tensor` with integers of 4 or 8 bits. They
are part of the checkpoint, and written again. `Int4Tensor` and its relatives hold integers in the order that one CUDA
kernel reads; they are not read.

(torchao/quantization/quantize_/workflows, torchao/prototype/safetensors)
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SCAPError
from ..quantized import StoredTensor
from ..weights import IntegerWeights
from ..weights.integers import BITS, SCALE_DTYPES
from .base import Adopted, LayerShape, LayerStorage, Reader, expect, stored_as, to_signed, to_unsigned


_PREFIX = "_weight_"


class _Storage(LayerStorage):
    def __init__(self, layer: LayerShape, bits: int, symmetric: bool, tensors: Mapping[str, StoredTensor]) -> None:
        (_, groups), dtype = tensors[f"{_PREFIX}scale"]
        super().__init__(tensors, bits, groups, dtype, "none" if symmetric else "integers")
        self._bits = bits
        self._symmetric = symmetric

    def read(self, tensors: Mapping[str, Tensor]) -> IntegerWeights:
        integers, scales, zero_points = (tensors.get(f"{_PREFIX}{name}") for name in ("qdata", "scale", "zero_point"))
        assert integers is not None and scales is not None
        if self._symmetric:
            if zero_points is not None and bool(zero_points.any()):
                raise ValueError(f"{_PREFIX}zero_point is not zero, though the config says symmetric")
            return IntegerWeights(self._bits, integers.contiguous(), scales.contiguous())
        assert zero_points is not None
        unsigned, moved = (to_unsigned(value, self._bits) for value in (integers, zero_points))
        return IntegerWeights(self._bits, unsigned, scales.contiguous(), moved)

    def write(self, weights: IntegerWeights) -> dict[str, Tensor]:
        bits, integers, scales, zero_points = weights
        found = {f"{_PREFIX}scale": scales}
        if zero_points is None:
            found[f"{_PREFIX}qdata"] = integers
            found[f"{_PREFIX}zero_point"] = torch.zeros(scales.shape, dtype=torch.int8, device=scales.device)
        else:
            found[f"{_PREFIX}qdata"] = to_signed(integers, bits)
            found[f"{_PREFIX}zero_point"] = to_signed(zero_points, bits)
        return {name: found[name] for name in self.tensors}


class TorchAOReader(Reader):
    name = "torchao"
    methods = ("torchao",)
    marker = f"{_PREFIX}qdata"

    def check(self, config: Mapping[str, Any]) -> None:
        if config.get("include_input_output_embeddings"):
            raise SCAPError("torchao: quantized embeddings (include_input_output_embeddings) are not supported")

    def storage(
        self,
        config: Mapping[str, Any],
        layer: LayerShape,
        stored: Mapping[str, StoredTensor],
        metadata: Mapping[str, str],
    ) -> _Storage:
        try:
            described = json.loads(metadata[f"{layer.path}.weight"])
            kind, fields = described["_type"], described["_data"]
        except (KeyError, ValueError, TypeError) as error:
            raise SCAPError(
                f"layer {layer.path}: the file's metadata do not say how its weights are stored"
            ) from error
        return _storage(layer, kind, fields, stored, _is_symmetric(config))

    def adopt(self, module: nn.Module, path: str) -> Adopted | None:
        weight: Any = module._parameters.get("weight")
        if type(weight).__module__.partition(".")[0] != "torchao" or not isinstance(module, nn.Linear):
            return None
        names = ("qdata", "scale", "zero_point")
        found = {f"{_PREFIX}{name}": getattr(weight, name, None) for name in names}
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        fields = {name: value for name, value in vars(weight).items() if not isinstance(value, Tensor)}
        fields["target_dtype"] = {"_data": str(fields.get("target_dtype")).removeprefix("torch.")}
        layer = LayerShape(path, module.in_features, module.out_features)
        zero_point = tensors.get(f"{_PREFIX}zero_point")
        symmetric = zero_point is None or not bool(zero_point.any())
        for name in ("act_pre_scale", "act_quant_scale"):
            if getattr(weight, name, None) is not None:
                raise SCAPError(f"layer {path}: torchao scales or quantizes its activations ({name})")
        storage = _storage(layer, type(weight).__name__, fields, stored_as(tensors), symmetric)
        bias: Any = module.bias
        return Adopted(layer, storage, tensors, bias)

    def kept_metadata(self, metadata: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in metadata.items() if name != "format"}

    def made_metadata(self, model: nn.Module) -> dict[str, str]:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        return self.kept_metadata(flatten_tensor_state_dict(model.state_dict())[1])


def _storage(
    layer: LayerShape, kind: str, fields: Mapping[str, Any], stored: Mapping[str, StoredTensor], symmetric: bool
) -> _Storage:
    if kind not in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
        raise SCAPError(
            f"layer {layer.path}: torchao's {kind} is not read, only Int8Tensor and IntxUnpackedToInt8Tensor"
        )
    if fields.get("act_quant_kwargs") is not None or fields.get("activation_quantization") is not None:
        raise SCAPError(f"layer {layer.path}: quantized activations are not supported, only weights")
    bits = 8
    if kind == "IntxUnpackedToInt8Tensor":
        target = str((fields.get("target_dtype") or {}).get("_data"))
        bits = int(target.removeprefix("int")) if target.removeprefix("int").isdigit() else 0
        if bits not in BITS:
            raise SCAPError(f"layer {layer.path}: weights of type {target} are not read, only int4 and int8")
    scale = stored.get(f"{_PREFIX}scale")
    groups = scale.shape[1] if scale is not None and len(scale.shape) == 2 else 1
    if groups == 0 or layer.in_features % groups != 0:
        raise SCAPError(
            f"{layer.path}.{_PREFIX}scale has {groups} groups, which do not divide {layer.in_features} input channels"
        )
    wanted: dict[str, tuple[tuple[int, ...], Any]] = {
        f"{_PREFIX}qdata": ((layer.out_features, layer.in_features), torch.int8),
        f"{_PREFIX}scale": ((layer.out_features, groups), SCALE_DTYPES),
    }
    if f"{_PREFIX}zero_point" in stored or not symmetric:
        wanted[f"{_PREFIX}zero_point"] = ((layer.out_features, groups), torch.int8)
    return _Storage(layer, bits, symmetric, expect(layer, stored, wanted))


def _is_symmetric(config: Mapping[str, Any]) -> bool:
    """Whether the config promises that all zero points are zero."""
    kind = config.get("quant_type")
    kind = kind.get("default", {}) if isinstance(kind, Mapping) else {}
    fields = kind.get("_data") or {}
    if kind.get("_type") == "Int8WeightOnlyConfig":
        return True
    mapping = fields.get("mapping_type")
    return isinstance(mapping, Mapping) and mapping.get("_data") == "SYMMETRIC"
