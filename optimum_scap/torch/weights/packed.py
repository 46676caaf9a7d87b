"""INT4 and INT8 weights as the sparse kernels read them, one input channel after the other.

Integers are stored from 0 on: those without zero points plus 8 or 128. A word of 32 bits holds 8 or 4 of them, which a
kernel turns into floating-point numbers with few instructions: see `kernels.load.unpack_integers`.

    part p of a word       byte p of INT8; of INT4 the lower half of byte p, or the upper half of byte p - 4
    output channel         (tile * parts + p) * 8 + w      of part p of word w of a tile: 64 or 32 output channels
    words                  [in_features, 8 * tiles], int32; zeros behind the last output channel
    scales, zero points    [groups, out_features]

A thread that reads four words of a tile finds their scales next to each other, part by part, and writes its sums so.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import KernelArguments, WeightFormat, Weights, register
from .integers import IntegerWeights, apply_scales, check


WORDS_PER_TILE = 8
# Weights that are multiplied by many rows at a time, in the type of the rows.
BYTES_PER_BLOCK = 136_000_000
# Matrix products go by tiles of this or of half the size.
COLUMNS_PER_BLOCK = 1024


class PackedFormat(WeightFormat[IntegerWeights]):
    """Three tensors: words, scales, and zero points (uint8), offsets (floating-point) or nothing (no elements).

    Args:
        bits: 4 or 8.
    """

    tensor_count = 3

    def __init__(self, bits: int) -> None:
        self.name = f"int{bits}"
        self.bits = bits
        self.parts = 32 // bits

    def pack(self, stored: IntegerWeights) -> Weights:
        """See `WeightFormat.pack`.

        Raises:
            ValueError: what is wrong with the integers, scales or zero points.
        """
        check(stored)
        bits, integers, scales, zero_points = stored
        if bits != self.bits:
            raise ValueError(f"{self.name} weights are of {self.bits} bits, got integers of {bits} bits")
        signed = zero_points is None
        origin = 1 << bits - 1 if signed else 0
        _check_range(integers, -origin, (1 << bits) - 1 - origin, "integers")
        if zero_points is None:
            zero_points = torch.empty((0, 0), dtype=torch.uint8, device=integers.device)
        elif not zero_points.is_floating_point():
            _check_range(zero_points, 0, 255, "zero points")
            zero_points = zero_points.to(torch.uint8)
        tensors = (self._words(integers, origin), scales.t().contiguous(), zero_points.t().contiguous())
        return Weights(self.name, tensors)

    def unpack(self, tensors: Sequence[Tensor]) -> IntegerWeights:
        _, scales, zero_points = tensors
        signed = zero_points.numel() == 0
        integers = self._integers(tensors, 0, scales.shape[1])
        if signed:
            integers = (integers - (1 << self.bits - 1)).view(torch.int8)  # uint8 wraps around
        return IntegerWeights(
            self.bits, integers.contiguous(), scales.t().contiguous(), None if signed else zero_points.t().contiguous()
        )

    def shape(self, tensors: Sequence[Tensor]) -> tuple[int, int]:
        return tensors[1].shape[1], tensors[0].shape[0]

    def dequantize(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """float32 by default: see `integers.dequantize`, which gives the same numbers."""
        return self.dequantize_columns(tensors, 0, tensors[1].shape[1], dtype or torch.float32).t()

    def dequantize_columns(self, tensors: Sequence[Tensor], begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """`[in_features, end - begin]` of the output channels from `begin`, where a tile begins, to `end`."""
        _, scales, zero_points = tensors
        groups = scales.shape[0]
        integers = self._integers(tensors, begin, end).t().float().view(groups, -1, end - begin)
        shift = zero_points[:, begin:end] if zero_points.numel() > 0 else None
        if shift is None:
            integers -= 1 << self.bits - 1
        else:
            shift = shift[:, None, :]
        return apply_scales(integers, scales[:, None, begin:end], shift).to(dtype).flatten(0, 1)

    def blocks(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
        """Ranges of output channels, of about BYTES_PER_BLOCK in `dtype`; multiples of COLUMNS_PER_BLOCK."""
        out_features, in_features = self.shape(tensors)
        size = max(1, BYTES_PER_BLOCK // (dtype.itemsize * max(1, in_features) * COLUMNS_PER_BLOCK))
        size *= COLUMNS_PER_BLOCK
        for begin in range(0, out_features, size):
            yield begin, min(begin + size, out_features)

    def row_sums(self, tensors: Sequence[Tensor]) -> Tensor:
        blocks = self.blocks(tensors, torch.float32)
        return torch.cat([self.dequantize_columns(tensors, *block, torch.float32).sum(dim=0) for block in blocks])

    def multiply(self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        """See `WeightFormat.multiply`; never more than a block of the weights is held in another form."""
        if x.is_cuda and not (torch.is_grad_enabled() and x.requires_grad):
            from ..kernels import library

            return library.run(library.integer_linear, x, list(tensors), self.name, bias)
        return self.multiply_by_blocks(x, tensors, bias)

    def multiply_by_blocks(self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        """`multiply` in plain torch, which has gradients."""
        products = []
        for begin, end in self.blocks(tensors, x.dtype):
            weight = self.dequantize_columns(tensors, begin, end, x.dtype)
            products.append(F.linear(x, weight.t(), None if bias is None else bias[begin:end].to(x.dtype)))
        return torch.cat(products, dim=-1)

    def kernel_arguments(self, tensors: Sequence[Tensor], input_major: bool) -> KernelArguments:
        """Both kinds of kernels read single input channels."""
        words, scales, zero_points = tensors
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise ValueError(f"{self.name} weights must be contiguous as `pack` made them")
        kind = "none"
        if zero_points.numel() > 0:
            kind = "offsets" if zero_points.is_floating_point() else "integers"
        return KernelArguments(
            (words, scales) if kind == "none" else (words, scales, zero_points),
            (words.shape[1] // WORDS_PER_TILE,),
            (self.bits, WORDS_PER_TILE, kind),
            self.parts,
            WORDS_PER_TILE,
            words.shape[0] // max(1, scales.shape[0]),
        )

    def _places(self) -> list[int]:
        """The lowest bit of each part of a word."""
        return [8 * (part % 4) + 4 * (part // 4) for part in range(self.parts)]

    def _words(self, integers: Tensor, origin: int) -> Tensor:
        out_features, in_features = integers.shape
        tile = WORDS_PER_TILE * self.parts
        tiles = -(-out_features // tile)
        padded = integers.new_zeros((tiles * tile, in_features), dtype=torch.uint8)
        padded[:out_features] = integers.view(torch.uint8) + origin  # which wraps around
        by_part = padded.view(tiles, self.parts, WORDS_PER_TILE, in_features)
        words = integers.new_zeros((tiles, WORDS_PER_TILE, in_features), dtype=torch.int32)
        for part, place in enumerate(self._places()):
            words |= by_part[:, part].to(torch.int32) << place
        return words.view(tiles * WORDS_PER_TILE, in_features).t().contiguous()

    def _integers(self, tensors: Sequence[Tensor], begin: int, end: int) -> Tensor:
        """Stored integers `[end - begin, in_features]`, uint8; `begin` is where a tile begins."""
        words = tensors[0]
        in_features = words.shape[0]
        tile = WORDS_PER_TILE * self.parts
        first, last = begin // tile, -(-end // tile)
        words = words[:, first * WORDS_PER_TILE : last * WORDS_PER_TILE].t().contiguous()
        words = words.view(last - first, WORDS_PER_TILE, in_features)
        mask = (1 << self.bits) - 1
        parts = [(words >> place & mask).to(torch.uint8) for place in self._places()]
        return torch.stack(parts, dim=1).view(-1, in_features)[: end - begin]


def _check_range(integers: Tensor, low: int, high: int, what: str) -> None:
    if integers.numel() == 0:
        return
    least, most = (int(value) for value in integers.aminmax())
    if least < low or most > high:
        raise ValueError(f"{what} must be from {low} to {high}, got some from {least} to {most}")


register(PackedFormat(4))
register(PackedFormat(8))
