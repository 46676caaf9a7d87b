"""compressed-tensors' `pack-quantized` and `int-quantized` checkpoints, of llm-compressor and others.

    weight_packed      [out, ceil(in * bits / 32)] int32: integers from 0 on, those of the lowest input channels lowest
    weight             [out, in] int8, instead, of `int-quantized`
    weight_scale       [out, groups]
    weight_zero_point  asymmetric: int8 [out, groups]; of `pack-quantized` packed along the output channels,
                       [out * bits / 32, groups] int32
    weight_shape       [2] int64, out and in; of `pack-quantized`
    weight_g_idx       [in] int32, where channels were ordered by activations

    w = (q - zero_point) * scale, q and zero_point from -2^(bits - 1)

(compressed_tensors/compressors/pack_quantized, naive_quantized, quantization/lifecycle/forward.py)
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import SCAPError
from ..quantized import Storage, StoredTensor
from ..weights import IntegerWeights
from ..weights.integers import BITS, SCALE_DTYPES, dequantize
from .base import (
    Adopted,
    LayerShape,
    LayerStorage,
    Reader,
    expect,
    pack_bits,
    stored_as,
    to_signed,
    to_unsigned,
    unpack_bits,
)


FORMATS = ("pack-quantized", "int-quantized")


class _Storage(LayerStorage):
    def __init__(self, layer: LayerShape, bits: int, tensors: Mapping[str, StoredTensor]) -> None:
        (_, groups), dtype = tensors["weight_scale"]
        zeros = [name for name in ("weight_zero_point", "weight_offset") if name in tensors]
        super().__init__(tensors, bits, groups, dtype, zeros[0] if zeros else "none")
        self._layer = layer
        self._bits = bits
        self._is_packed = "weight_packed" in tensors
        group_size = None if groups == 1 else layer.in_features // groups
        self.scheme = (bits, group_size, not zeros)

    def read(self, tensors: Mapping[str, Tensor]) -> IntegerWeights:
        if self._is_packed:
            shape = tensors["weight_shape"].tolist()
            if shape != [self._layer.out_features, self._layer.in_features]:
                raise ValueError(f"weight_shape says {shape}")
            unsigned = unpack_bits(tensors["weight_packed"], self._bits)[:, : self._layer.in_features]
        else:
            unsigned = to_unsigned(tensors["weight"], self._bits)
        zero_points = tensors.get("weight_zero_point")
        scales = tensors["weight_scale"].contiguous()
        if "weight_offset" in tensors:
            return IntegerWeights(self._bits, unsigned.contiguous(), scales, tensors["weight_offset"].contiguous())
        if zero_points is None:
            return IntegerWeights(self._bits, to_signed(unsigned, self._bits), scales)
        if self._is_packed:
            zero_points = unpack_bits(zero_points.t().contiguous(), self._bits).t()[: self._layer.out_features]
        else:
            zero_points = to_unsigned(zero_points, self._bits)
        return IntegerWeights(self._bits, unsigned.contiguous(), scales, zero_points.contiguous())

    def write(self, weights: IntegerWeights) -> dict[str, Tensor]:
        bits, integers, scales, zero_points = weights
        found = {"weight_scale": scales}
        unsigned = to_unsigned(integers, bits) if zero_points is None else integers
        if self._is_packed:
            shape = [self._layer.out_features, self._layer.in_features]
            found["weight_packed"] = pack_bits(unsigned, bits)
            found["weight_shape"] = torch.tensor(shape, dtype=self.tensors["weight_shape"].dtype, device=scales.device)
        else:
            found["weight"] = to_signed(unsigned, bits)
        if "weight_offset" in self.tensors:
            assert zero_points is not None
            found["weight_offset"] = zero_points
        elif zero_points is not None and self._is_packed:
            found["weight_zero_point"] = pack_bits(zero_points.t().contiguous(), bits).t().contiguous()
        elif zero_points is not None:
            found["weight_zero_point"] = to_signed(zero_points, bits)
        return {name: found[name] for name in self.tensors}


def packed_storage(layer: LayerShape, weights: IntegerWeights) -> _Storage:
    """How `pack-quantized` stores weights that come from elsewhere."""
    return _Storage(layer, weights.bits, _kinds(layer, weights, is_packed=True))


def packed_config(layers: Mapping[str, Storage], others: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a `pack-quantized` checkpoint.

    Args:
        layers: the quantized layers by path, stored as `packed_storage` says.
        others: paths of the nn.Linear that are not quantized.
    """
    schemes: dict[tuple[int, int | None, bool], list[str]] = {}
    for path, storage in layers.items():
        assert isinstance(storage, _Storage)
        schemes.setdefault(storage.scheme, []).append(path)
    groups = {}
    for number, ((bits, group_size, symmetric), paths) in enumerate(schemes.items()):
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(schemes) == 1 else paths,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if group_size is None else "group",
                "group_size": group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(others),
        "kv_cache_scheme": None,
    }


class CompressedTensorsReader(Reader):
    name = "compressed-tensors"
    methods: tuple[str, ...] = ("compressed-tensors", "compressed_tensors")
    marker = "weight_scale"

    def check(self, config: Mapping[str, Any]) -> None:
        kind = config.get("format")
        if kind not in FORMATS:
            raise SCAPError(f"compressed-tensors checkpoints of format {kind} are not read, only {', '.join(FORMATS)}")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise SCAPError("the quantization_config has no config_groups")
        for name, scheme in groups.items():
            if not isinstance(scheme, Mapping) or not isinstance(scheme.get("weights"), Mapping):
                raise SCAPError(f"config_groups.{name} in the quantization_config has no weights")
            for what in ("input_activations", "output_activations"):
                if scheme.get(what) is not None:
                    raise SCAPError(
                        f"config_groups.{name}.{what}: quantized activations are not supported, only weights"
                    )
            if scheme["weights"].get("type", "int") != "int":
                raise SCAPError(f"config_groups.{name}.weights are of type {scheme['weights'].get('type')}, not int")
            if scheme["weights"].get("num_bits") not in BITS:
                bits = scheme["weights"].get("num_bits")
                raise SCAPError(f"config_groups.{name}.weights are of {bits} bits; 4 and 8 are read")
        if config.get("kv_cache_scheme") is not None:
            raise SCAPError("kv_cache_scheme: quantized activations are not supported, only weights")
        if config.get("transform_config"):
            raise SCAPError("transform_config: rotated activations are not supported")
        if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
            raise SCAPError("sparsity_config: compressed sparse weights are not supported")

    def storage(
        self,
        config: Mapping[str, Any],
        layer: LayerShape,
        stored: Mapping[str, StoredTensor],
        metadata: Mapping[str, str],
    ) -> _Storage:
        out_features = layer.out_features
        if "weight_g_idx" in stored:
            raise SCAPError(f"{layer.path}.weight_g_idx: weights ordered by activations are not supported")
        packed = stored.get("weight_packed")
        bits = 8
        if packed is not None:
            # 32 * words / in_features is the number of bits, or a little more where the last word is not full
            fitting = [n for n in BITS if packed.shape == (out_features, -(-layer.in_features * n // 32))]
            bits = fitting[0] if fitting else _only_bits(config)
        scale = stored.get(self.marker)
        groups = scale.shape[1] if scale is not None and len(scale.shape) == 2 else 1
        if groups > 1 and layer.in_features % groups != 0:
            raise SCAPError(
                f"{layer.path}.weight_scale has {groups} groups, which {layer.in_features} input channels cannot form"
            )
        wanted: dict[str, tuple[tuple[int, ...], Any]] = {"weight_scale": ((out_features, groups), SCALE_DTYPES)}
        if packed is not None:
            wanted["weight_packed"] = ((out_features, -(-layer.in_features * bits // 32)), torch.int32)
            wanted["weight_shape"] = ((2,), (torch.int64, torch.int32))
        else:
            wanted["weight"] = ((out_features, layer.in_features), torch.int8)
        if "weight_zero_point" in stored:
            if packed is not None:
                wanted["weight_zero_point"] = ((-(-out_features * bits // 32), groups), torch.int32)
            else:
                wanted["weight_zero_point"] = ((out_features, groups), torch.int8)
        if "weight_offset" in stored:
            wanted["weight_offset"] = ((out_features, groups), SCALE_DTYPES)
        return _Storage(layer, bits, expect(layer, stored, wanted))

    def adopt(self, module: nn.Module, path: str) -> Adopted | None:
        scheme: Any = getattr(module, "quantization_scheme", None)
        if scheme is None or not isinstance(module, nn.Linear) or getattr(scheme, "weights", None) is None:
            return None
        if scheme.input_activations is not None or scheme.output_activations is not None:
            raise SCAPError(f"layer {path}: quantized activations are not supported, only weights")
        bits = scheme.weights.num_bits
        if scheme.weights.type != "int" or bits not in BITS:
            raise SCAPError(f"layer {path}: weights of type {scheme.weights.type} and {bits} bits are not read")
        own = {name: value for name, value in {**module._parameters, **module._buffers}.items() if value is not None}
        bias: Any = own.pop("bias", None)
        tensors: dict[str, Tensor] = {name: value.detach() for name, value in own.items()}
        layer = LayerShape(path, module.in_features, module.out_features)
        config = {"config_groups": {"0": {"weights": {"num_bits": bits}}}}
        if getattr(module, "quantization_status", None) != "compressed":
            # As the library leaves layers that have run: the weights multiplied out, with scales and zero points.
            weights = _recovered(layer, bits, tensors)
            is_packed = bits == 4 or "weight_shape" in tensors
            tensors = _Storage(layer, bits, _kinds(layer, weights, is_packed)).write(weights)
        stored = stored_as(tensors)
        return Adopted(layer, self.storage(config, layer, stored, {}), tensors, bias)


def _kinds(layer: LayerShape, weights: IntegerWeights, is_packed: bool) -> dict[str, StoredTensor]:
    """What such weights are stored as."""
    bits, integers, scales, zero_points = weights
    out_features, groups = scales.shape
    found = {"weight_scale": StoredTensor((out_features, groups), scales.dtype)}
    if is_packed:
        found["weight_packed"] = StoredTensor((out_features, -(-layer.in_features * bits // 32)), torch.int32)
        found["weight_shape"] = StoredTensor((2,), torch.int64)
    else:
        found["weight"] = StoredTensor(tuple(integers.shape), torch.int8)
    if zero_points is not None and zero_points.is_floating_point():
        found["weight_offset"] = StoredTensor((out_features, groups), zero_points.dtype)
    elif zero_points is not None and is_packed:
        found["weight_zero_point"] = StoredTensor((-(-out_features * bits // 32), groups), torch.int32)
    elif zero_points is not None:
        found["weight_zero_point"] = StoredTensor((out_features, groups), torch.int8)
    return found


def _recovered(layer: LayerShape, bits: int, tensors: Mapping[str, Tensor]) -> IntegerWeights:
    """The integers of weights that were multiplied out.

    Raises:
        SCAPError: if the weights are no integers times their scales.
    """
    weight, scales, zero_points = tensors["weight"], tensors["weight_scale"], tensors.get("weight_zero_point")
    if weight.is_meta:
        raise SCAPError(f"layer {layer.path}: its weights are offloaded")
    out_features, groups = scales.shape
    origin = 1 << bits - 1
    quotients = (weight.float().view(out_features, groups, -1) / scales.float()[:, :, None]).round()
    if zero_points is not None:
        quotients += zero_points.float()[:, :, None]
    signed = quotients.clamp(-origin, origin - 1).to(torch.int8).view(weight.shape)
    weights = IntegerWeights(bits, signed, scales.contiguous())
    if zero_points is not None:
        weights = IntegerWeights(
            bits, to_unsigned(signed, bits), scales.contiguous(), to_unsigned(zero_points.to(torch.int8), bits)
        )
    if not torch.equal(dequantize(weights, weight.dtype), weight):
        raise SCAPError(f"layer {layer.path}: its weights are no integers of {bits} bits times their scales")
    return weights


def _only_bits(config: Mapping[str, Any]) -> int:
    """The number of bits that the config names first, for messages about a shape that fits none."""
    return next(scheme["weights"]["num_bits"] for scheme in config["config_groups"].values())
