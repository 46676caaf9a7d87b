"""How the kernels read weights: four functions per format of `torch.weights`, by the name of the format.

read(tensors, strides, first, channels, words, word_mask, channel_mask, zero, HOLD, CONSTANTS) -> words read
unpack(word, zero, CONSTANTS) -> parts
load_scales(tensors, strides, group, words, word_mask, features, CONSTANTS) -> scales
apply_scales(sums, scales, ROWS, CONSTANTS) -> totals

tensors, strides    of one layer, as `WeightFormat.kernel_arguments` returned them
first, channels     reads the input channels first + channels[0], first + channels[1], ...: a tuple
words               and of each the words with these numbers, see `KernelArguments`
word_mask           which of the words there are; None if all are
channel_mask        which of the channels there are; None if all are
zero                0, which the compiler cannot know
HOLD                for `hold`, which comes between reading the words and unpacking them
CONSTANTS           of the format, and behind them whether activations are float32
words read          a tuple like `channels`; zero where masked
parts               of a word: one float32 number per output channel it holds, a tuple
group               of input channels, which share the scales
features            output channels
sums                as `accumulate_channels` returns them, over channels of the group
totals              sum over the channels of (x_i - m) W[:, i]: one tensor like `words` per row and part
"""
# mypy: ignore-errors

from typing import NamedTuple

import triton
import triton.language as tl
from triton.runtime import JITFunction

from .device_functions import columns_of
from .memory import hold, read


class FormatFunctions(NamedTuple):
    """The functions of a format."""

    read: JITFunction
    unpack: JITFunction
    load_scales: JITFunction
    apply_scales: JITFunction


@triton.jit
def read_dense(
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
    """CONSTANTS[0]: whether the weights of an input channel are contiguous, or those of an output channel."""
    weights = ()
    for step in tl.static_range(len(channels)):
        if CONSTANTS[0]:
            # Unsigned 32 bits times 32 bits to 64 bits is one instruction.
            offset = channels[step].to(tl.uint32).to(tl.int64) * tl.cast(strides[0], tl.uint32).to(tl.int64)
            pointers = tensors[0] + tl.cast(first, tl.int64) * strides[0] + offset + words
        else:
            pointers = tensors[0] + words.to(tl.int64) * strides[0] + channels[step] + first
        weights += (read(pointers, word_mask, channel_mask),)
    return hold(weights, zero, HOLD)


@triton.jit
def unpack_dense(word, zero, CONSTANTS: tl.constexpr):
    return (word.to(tl.float32),)


@triton.jit
def load_no_scales(tensors, strides, group, words, word_mask, features, CONSTANTS: tl.constexpr):
    return ()


@triton.jit
def apply_no_scales(sums, scales, ROWS: tl.constexpr, CONSTANTS: tl.constexpr):
    totals = ()
    for row in tl.static_range(ROWS):
        totals += (sums[row],)
    return totals


@triton.jit
def read_integers(
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
    """Words of several integers; strides[0] is the number of tiles per channel."""
    found = ()
    for step in tl.static_range(len(channels)):
        # So much is known to divide the stride that 16 bytes are read at once.
        stride = tl.cast(strides[0], tl.uint32) * CONSTANTS[1]
        offset = channels[step].to(tl.uint32).to(tl.int64) * stride.to(tl.int64)
        pointers = tensors[0] + tl.cast(first, tl.int64) * stride + offset + words
        found += (read(pointers, word_mask, channel_mask),)
    return hold(found, zero, HOLD)


@triton.jit
def _to_mantissa(word, PLACE: tl.constexpr, BITS: tl.constexpr):
    """Moves the BITS bits from PLACE on to bits 22 and below."""
    if PLACE < 23 - BITS:
        return word << (23 - BITS - PLACE)
    else:
        return word >> (PLACE - 23 + BITS)


@triton.jit
def unpack_integers(word, zero, CONSTANTS: tl.constexpr):
    """1 + q / 2^bits of each integer q of the words, from 0 on; less 1.5, which is exact, for INT8 weights and float32
    activations: the sums of INT4 weights lose less than three bits without it, those of INT8 weights would seven.

    An integer becomes the upper bits of the mantissa of a number from 1 to 2. One shift and one other instruction do
    it, where a conversion would run at a quarter of the rate. `weights.packed` says where in a word integers stand.
    """
    BITS: tl.constexpr = CONSTANTS[0]
    CENTERED: tl.constexpr = BITS == 8 or CONSTANTS[3]
    MASK: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    word = word.to(tl.uint32, bitcast=True)
    # One instruction combines three registers, but only two if the third operand is another constant.
    one = tl.cast(zero, tl.uint32) + 0x3F800000
    parts = ()
    for part in tl.static_range(32 // BITS):
        moved = _to_mantissa(word, 8 * (part % 4) + 4 * (part // 4), BITS)
        number = ((moved & MASK) | one).to(tl.float32, bitcast=True)
        if CENTERED:
            number -= 1.5
        parts += (number,)
    return parts


@triton.jit
def load_integer_scales(tensors, strides, group, words, word_mask, features, CONSTANTS: tl.constexpr):
    """Of each part the scales, and behind them of each part the zero points if there are any, in their own types."""
    PARTS: tl.constexpr = 32 // CONSTANTS[0]
    scales = ()
    for tensor in tl.static_range(1, len(tensors)):
        for part in tl.static_range(PARTS):
            columns = columns_of(words, part, CONSTANTS[1], PARTS)
            pointers = tensors[tensor] + tl.cast(group, tl.int64) * features + columns
            if word_mask is None:
                scales += (tl.load(pointers),)
            else:
                scales += (tl.load(pointers, mask=columns < features, other=0),)
    return scales


@triton.jit
def apply_integer_scales(sums, scales, ROWS: tl.constexpr, CONSTANTS: tl.constexpr):
    """Of the sums of x * (1 + q / 2^bits), or less 1.5, and the sums of x: the sums of x * weights.

    CONSTANTS[2] says what the zero points are: "none", "integers" or "offsets".
    """
    LEVELS: tl.constexpr = 1 << CONSTANTS[0]
    PARTS: tl.constexpr = 32 // CONSTANTS[0]
    CENTERED: tl.constexpr = CONSTANTS[0] == 8 or CONSTANTS[3]
    ORIGIN: tl.constexpr = -0.5 if CENTERED else 1.0
    totals = ()
    for row in tl.static_range(ROWS):
        x_sum = sums[ROWS * PARTS + row]
        for part in tl.static_range(PARTS):
            factor = scales[part].to(tl.float32) * LEVELS
            if CONSTANTS[2] == "none" and CENTERED:
                total = sums[row * PARTS + part] * factor
            elif CONSTANTS[2] == "none":
                total = (sums[row * PARTS + part] - (ORIGIN + 0.5) * x_sum) * factor
            elif CONSTANTS[2] == "integers":
                zero_point = scales[PARTS + part].to(tl.float32) * (1.0 / LEVELS) + ORIGIN
                total = (sums[row * PARTS + part] - zero_point * x_sum) * factor
            else:
                offset = scales[PARTS + part].to(tl.float32)
                total = (sums[row * PARTS + part] - ORIGIN * x_sum) * factor + offset * x_sum
            totals += (total,)
    return totals


_INTEGERS = FormatFunctions(read_integers, unpack_integers, load_integer_scales, apply_integer_scales)
FORMAT_FUNCTIONS = {
    "dense": FormatFunctions(read_dense, unpack_dense, load_no_scales, apply_no_scales),
    "int4": _INTEGERS,
    "int8": _INTEGERS,
}
