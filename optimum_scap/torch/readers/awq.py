"""AWQ checkpoints in AutoAWQ's `gemm` layout.

    qweight  [in, out / 8] int32: integers of eight neighboring output channels, from the lowest bits on in the order
             0, 2, 4, 6, 1, 3, 5, 7
    qzeros   [groups, out / 8] int32: zero points, in the same order
    scales   [groups, out]

    w = (q - zero_point) * scale

(AWQ, arXiv 2306.00978; the layout is AutoAWQ's `WQLinear_GEMM`.)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import SCAPError
from ..quantized import StoredTensor
from ..weights import IntegerWeights
from ..weights.integers import SCALE_DTYPES
from .base import LayerShape, LayerStorage, Reader, expect, groups_of, pack_bits, unpack_bits


BITS = 4
# Of output channel 0, 1, ... of a word: its place, counted from the lowest bits.
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class _Storage(LayerStorage):
    def read(self, tensors: Mapping[str, Tensor]) -> IntegerWeights:
        return IntegerWeights(
            BITS,
            unpack_bits(tensors["qweight"], BITS, PLACES).t().contiguous(),
            tensors["scales"].t().contiguous(),
            unpack_bits(tensors["qzeros"], BITS, PLACES).t().contiguous(),
        )

    def write(self, weights: IntegerWeights) -> dict[str, Tensor]:
        assert weights.zero_points is not None
        found = {
            "qweight": pack_bits(weights.integers.t().contiguous(), BITS, PLACES),
            "qzeros": pack_bits(weights.zero_points.t().contiguous(), BITS, PLACES),
            "scales": weights.scales.t().contiguous(),
        }
        return {name: found[name] for name in self.tensors}


class AWQReader(Reader):
    name = "AWQ"
    methods = ("awq",)
    marker = "qweight"

    def check(self, config: Mapping[str, Any]) -> None:
        bits = config.get("bits", config.get("w_bit", BITS))
        if bits != BITS:
            raise SCAPError(f"AWQ checkpoints of {bits} bits are not read, only of 4")
        named = (config.get(name) for name in ("version", "checkpoint_format", "format"))
        version = str(next((name for name in named if name is not None), "gemm")).lower()
        if version != "gemm":
            raise SCAPError(f"AWQ checkpoints of version {version} are not read, only gemm")
        if config.get("zero_point") is False:
            raise SCAPError("AWQ checkpoints without zero points (zero_point: false) are not read")

    def storage(
        self,
        config: Mapping[str, Any],
        layer: LayerShape,
        stored: Mapping[str, StoredTensor],
        metadata: Mapping[str, str],
    ) -> _Storage:
        groups = groups_of(layer, config.get("group_size", config.get("q_group_size", 128)))
        if layer.out_features % 8 != 0:
            raise SCAPError(f"layer {layer.path}: its {layer.out_features} output channels are no multiple of 8")
        wanted = {
            "qweight": ((layer.in_features, layer.out_features // 8), torch.int32),
            "qzeros": ((groups, layer.out_features // 8), torch.int32),
            "scales": ((groups, layer.out_features), SCALE_DTYPES),
        }
        found = expect(layer, stored, wanted)
        return _Storage(found, BITS, groups, found["scales"].dtype, "integers")
