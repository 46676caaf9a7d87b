"""GPTQ checkpoints, of AutoGPTQ, GPT-QModel, optimum and llm-compressor's predecessors.

    qweight  [in * bits / 32, out] int32: integers of neighboring input channels, from the lowest bits on
    qzeros   [groups, out * bits / 32] int32: zero points of neighboring output channels; in the first version
             (`checkpoint_format` "gptq") less one each, subtracted from the whole word, as GPT-QModel does: a zero
             point of 0 borrows from its neighbor. As they are in the second version ("gptq_v2")
    scales   [groups, out]
    g_idx    [in] int32: the group of each input channel

    w = (q - zero_point) * scale

(GPTQ, arXiv 2210.17323; the layout is AutoGPTQ's `QuantLinear`.)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import SCAPError
from ..quantized import StoredTensor
from ..weights import IntegerWeights
from ..weights.integers import BITS, SCALE_DTYPES
from .base import (
    LayerShape,
    LayerStorage,
    Reader,
    expect,
    groups_of,
    pack_bits,
    to_signed,
    to_unsigned,
    unpack_bits,
)


class _Storage(LayerStorage):
    def __init__(
        self, layer: LayerShape, bits: int, is_less: bool, symmetric: bool, tensors: Mapping[str, StoredTensor]
    ) -> None:
        (groups, _), dtype = tensors["scales"]
        super().__init__(tensors, bits, groups, dtype, "none" if symmetric else "integers")
        self._symmetric = symmetric
        self._layer = layer
        self._bits = bits
        # One in every integer of a word, in int32.
        self._less = sum(1 << place for place in range(0, 32, bits)) if is_less else 0

    def read(self, tensors: Mapping[str, Tensor]) -> IntegerWeights:
        bits = self._bits
        g_idx = tensors.get("g_idx")
        if g_idx is not None and not torch.equal(g_idx, self._g_idx(g_idx.dtype, g_idx.device)):
            raise ValueError(
                "g_idx does not count up: the channels were quantized in the order of their activations (desc_act, "
                "act-order), which needs another order of the input; quantize with desc_act=False"
            )
        integers = unpack_bits(tensors["qweight"].t().contiguous(), bits)
        zero_points = unpack_bits(tensors["qzeros"] + self._less, bits).t()
        scales = tensors["scales"].t().contiguous()
        origin = 1 << bits - 1
        if self._symmetric:
            if bool((zero_points != origin).any()):
                raise ValueError(f"qzeros has other zero points than {origin}, though the config says sym")
            return IntegerWeights(bits, to_signed(integers, bits), scales)
        return IntegerWeights(bits, integers, scales, zero_points.contiguous())

    def write(self, weights: IntegerWeights) -> dict[str, Tensor]:
        bits, integers, scales, zero_points = weights
        if zero_points is None:
            integers = to_unsigned(integers, bits)
            zero_points = torch.full_like(scales, 1 << bits - 1, dtype=torch.uint8)
        found = {
            "qweight": pack_bits(integers, bits).t().contiguous(),
            "qzeros": pack_bits(zero_points.t().contiguous(), bits) - self._less,
            "scales": scales.t().contiguous(),
        }
        if "g_idx" in self.tensors:
            found["g_idx"] = self._g_idx(self.tensors["g_idx"].dtype, scales.device)
        return {name: found[name] for name in self.tensors}

    def _g_idx(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        groups = self.tensors["scales"].shape[0]
        channels = torch.arange(self._layer.in_features, dtype=dtype, device=device)
        return channels // (self._layer.in_features // groups)


class GPTQReader(Reader):
    name = "GPTQ"
    methods = ("gptq",)
    marker = "qweight"

    def check(self, config: Mapping[str, Any]) -> None:
        if config.get("bits") not in BITS:
            raise SCAPError(f"GPTQ checkpoints of {config.get('bits')} bits are not read, only of 4 or 8")
        kind = config.get("checkpoint_format", "gptq")
        if kind not in ("gptq", "gptq_v2"):
            raise SCAPError(f"GPTQ checkpoints of checkpoint_format {kind} are not read, only gptq and gptq_v2")
        if config.get("dynamic"):
            raise SCAPError("GPTQ checkpoints with settings per layer (dynamic) are not read")

    def storage(
        self,
        config: Mapping[str, Any],
        layer: LayerShape,
        stored: Mapping[str, StoredTensor],
        metadata: Mapping[str, str],
    ) -> _Storage:
        bits = config["bits"]
        groups = groups_of(layer, config.get("group_size", -1))
        per_word = 32 // bits
        for what, count in (("input", layer.in_features), ("output", layer.out_features)):
            if count % per_word != 0:
                raise SCAPError(f"layer {layer.path}: its {count} {what} channels are no multiple of {per_word}")
        wanted: dict[str, tuple[tuple[int, ...], Any]] = {
            "qweight": ((layer.in_features // per_word, layer.out_features), torch.int32),
            "qzeros": ((groups, layer.out_features // per_word), torch.int32),
            "scales": ((groups, layer.out_features), SCALE_DTYPES),
        }
        if "g_idx" in stored:
            wanted["g_idx"] = ((layer.in_features,), (torch.int32, torch.int64))
        elif config.get("desc_act"):
            raise SCAPError(f"{layer.path}.g_idx is missing, and desc_act says that the order of channels matters")
        is_less = config.get("checkpoint_format") != "gptq_v2"
        return _Storage(layer, bits, is_less, config.get("sym") is True, expect(layer, stored, wanted))
