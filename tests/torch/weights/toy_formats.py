"""Two formats as small as formats can be, each a class and a function: INT8 per channel, and INT4 in groups."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from optimum_scap.torch.kernels.load import hold, read
from optimum_scap.torch.weights import KernelArguments, WeightFormat, Weights


class Int8Format(WeightFormat):
    """Integers `[out_features, in_features]`, one input channel after the other, and a scale per output channel."""

    name = "toy-int8"
    tensor_count = 2

    def pack(self, *stored: Tensor) -> Weights:
        if len(stored) == 1:
            scale = stored[0].float().abs().amax(dim=1) / 127
            stored = (torch.round(stored[0].float() / scale[:, None]).to(torch.int8), scale)
        return Weights(self.name, (stored[0].t().contiguous().t(), stored[1].float()))

    def shape(self, tensors: Sequence[Tensor]) -> tuple[int, int]:
        return tensors[0].shape[0], tensors[0].shape[1]

    def dequantize(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].float() * tensors[1][:, None]

    def kernel_arguments(self, tensors: Sequence[Tensor], input_major: bool) -> KernelArguments:
        return KernelArguments(tuple(tensors), (tensors[0].stride(1),))


@triton.jit
def load_int8(
    tensors,
    strides,
    first,
    channels,
    words,
    word_mask,
    channel_mask,
    zero,
    HOLD: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    integers = ()
    for step in tl.static_range(len(channels)):
        pointers = tensors[0] + (channels[step].to(tl.int64) + first) * strides[0] + words
        integers += (read(pointers, word_mask, channel_mask),)
    integers = hold(integers, zero, HOLD)
    scales = read(tensors[1] + words, word_mask, None)
    weights = ()
    for step in tl.static_range(len(channels)):
        weights += (integers[step].to(tl.float32) * scales,)
    return weights


class Int4Format(WeightFormat):
    """Bytes `[in_features, out_features / 2]` of two numbers each, and a scale per 16 input channels:
    `[in_features / 16, out_features]`, rounded up.
    """

    name = "toy-int4"
    tensor_count = 2
    group_size = 16

    def pack(self, *stored: Tensor) -> Weights:
        by_channel = stored[0].float().t()
        groups = by_channel.split(self.group_size)
        scales = torch.stack([group.abs().amax(dim=0) / 7 for group in groups])
        numbers = (torch.round(by_channel / self._of_channels(scales, by_channel.shape[0])) + 8).to(torch.uint8)
        packed = (numbers[:, ::2] & 15) | (numbers[:, 1::2] << 4)
        return Weights(self.name, (packed.contiguous(), scales))

    def _of_channels(self, scales: Tensor, in_features: int) -> Tensor:
        return scales.repeat_interleave(self.group_size, dim=0)[:in_features]

    def shape(self, tensors: Sequence[Tensor]) -> tuple[int, int]:
        return tensors[1].shape[1], tensors[0].shape[0]

    def dequantize(self, tensors: Sequence[Tensor]) -> Tensor:
        packed, scales = tensors
        numbers = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1).float() - 8
        return (numbers * self._of_channels(scales, packed.shape[0])).t()

    def kernel_arguments(self, tensors: Sequence[Tensor], input_major: bool) -> KernelArguments:
        packed, scales = tensors
        return KernelArguments((packed, scales), (packed.stride(0), scales.stride(0)), (self.group_size,), 2)


@triton.jit
def _interleave(even, odd):
    """Columns 0, 2, 4, ... and 1, 3, 5, ... of a block, brought together; columns are the first dimension."""
    if len(even.shape) == 1:
        return tl.interleave(even, odd)
    else:
        both = tl.permute(tl.join(even, odd), (0, 2, 1))
        return tl.reshape(both, (2 * even.shape[0], even.shape[1]))


@triton.jit
def load_int4(
    tensors,
    strides,
    first,
    channels,
    words,
    word_mask,
    channel_mask,
    zero,
    HOLD: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    packed = ()
    for step in tl.static_range(len(channels)):
        pointers = tensors[0] + (channels[step].to(tl.int64) + first) * strides[0] + words
        packed += (read(pointers, word_mask, channel_mask),)
    packed = hold(packed, zero, HOLD)
    weights = ()
    for step in tl.static_range(len(channels)):
        group = (channels[step].to(tl.int64) + first) // CONSTANTS[0]
        scales = tensors[1] + group * strides[1] + 2 * words
        even = ((packed[step] & 15).to(tl.float32) - 8.0) * read(scales, word_mask, channel_mask)
        odd = ((packed[step] >> 4).to(tl.float32) - 8.0) * read(scales + 1, word_mask, channel_mask)
        weights += (_interleave(even, odd),)
    return weights
