"""Models of `random_models` over INT4 and INT8 weights: for SCAP, and in the dense form that torch has of its own."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimum_scap.torch.quantized import QuantizedLinear
from optimum_scap.torch.readers.base import LayerShape
from optimum_scap.torch.readers.compressed_tensors import packed_storage
from optimum_scap.torch.weights import IntegerWeights


TINYGEMM_GROUP = 128
INNER_K_TILES = 8  # of tinygemm: 16 * 8 input channels to a tile


class Quantization(NamedTuple):
    """How weights are rounded: symmetric, to the nearest.

    Args:
        bits: 4, or 8.
        group_size: neighboring input channels with one scale; None for one per output channel.
    """

    bits: int
    group_size: int | None

    def round(self, weight: Tensor) -> IntegerWeights:
        """Integers and scales, in the type of `weight`, of `[out_features, in_features]`."""
        out_features, in_features = weight.shape
        largest = (1 << (self.bits - 1)) - 1
        grouped = weight.float().view(out_features, -1, self.group_size or in_features)
        scales = (grouped.abs().amax(-1) / largest).to(weight.dtype)
        integers = (grouped / scales.float()[:, :, None]).round_().clamp_(-largest, largest).to(torch.int8)
        return IntegerWeights(self.bits, integers.view_as(weight), scales)


def quantize(model: nn.Module, how: Quantization) -> None:
    """Has the layers of the decoder's blocks hold integer weights, as `optimum_scap` reads them from a checkpoint."""
    for path, layer in _layers(model):
        weights = how.round(layer.weight.detach())
        shape = LayerShape(path, layer.in_features, layer.out_features)
        storage = packed_storage(shape, weights)
        quantized = QuantizedLinear(*shape[1:], layer.bias, storage, layer.weight.dtype, path)
        quantized.take(storage.write(weights))
        for name in storage.tensors:
            del quantized._buffers[name]
        model.set_submodule(path, quantized)


def quantize_by_torch(model: nn.Module, how: Quantization) -> None:
    """The same weights in layers of torch's own."""
    cls = TinyGemmLinear if how.bits == 4 else CompiledInt8Linear
    for path, layer in _layers(model):
        model.set_submodule(path, cls(how.round(layer.weight.detach())))


class TinyGemmLinear(nn.Module):
    """torch's INT4 kernel, `_weight_int4pack_mm`, which torchao calls; bfloat16."""

    packed: Tensor
    scales: Tensor

    def __init__(self, weights: IntegerWeights) -> None:
        super().__init__()
        unsigned = (weights.integers + 8).view(torch.uint8)
        pairs = unsigned[:, ::2] << 4 | unsigned[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_K_TILES)
        self.register_buffer("packed", packed)
        scales = weights.scales.t().to(torch.bfloat16)
        self.register_buffer("scales", torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous())
        self.group_size = weights.group_size

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._weight_int4pack_mm(rows, self.packed, self.group_size, self.scales)
        return y.view(*x.shape[:-1], -1)


class CompiledInt8Linear(nn.Module):
    """One scale per output channel. torch.compile makes the product of one token a kernel that reads the bytes."""

    integers: Tensor
    scales: Tensor

    def __init__(self, weights: IntegerWeights) -> None:
        super().__init__()
        self.register_buffer("integers", weights.integers)
        self.register_buffer("scales", weights.scales.view(-1))

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.shape[-1]:
            product = (self.integers.to(x.dtype) * x.view(1, -1)).sum(-1, dtype=torch.float32)
            return (product * self.scales).to(x.dtype).view(*x.shape[:-1], -1)
        return F.linear(x, self.integers.to(x.dtype)) * self.scales


def _layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.startswith("model.layers.")
    ]
