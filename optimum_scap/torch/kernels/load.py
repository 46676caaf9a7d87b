"""How the kernels read weights: one function per format of `torch.weights`, by the name of the format.

    load(tensors, strides, first, channels, words, word_mask, channel_mask, zero, HOLD, CONSTANTS) -> weights

    tensors, strides    of one layer, as `WeightFormat.kernel_arguments` returned them
    first, channels     reads the input channels first + channels[0], first + channels[1], ...: a tuple
    words               and of each the words with these numbers, see `KernelArguments`
    word_mask           which of the words there are; None if all are
    channel_mask        which of the channels there are; None if all are
    zero, HOLD          for `hold`, which comes between reading the words and unpacking them
    CONSTANTS           of the format
    weights             a tuple like `channels`, in any number type; zero where masked

The sparse kernels read UNROLL single channels at a time, `words` `[BLOCK_N / columns_per_word]`, and want weights
`[BLOCK_N]`. The dense kernel reads one block of channels `[1, BLOCK_K]`, `words` `[BLOCK_N / columns_per_word, 1]`,
and wants weights `[BLOCK_N, BLOCK_K]`.
"""
# mypy: ignore-errors

import triton
import triton.language as tl


LOAD_FUNCTIONS = {}


def loads(name: str):
    """Registers a function that reads weights of the format `name`; the decorator in front of `triton.jit`."""

    def register(function):
        LOAD_FUNCTIONS[name] = function
        return function

    return register


def hold_instructions(unroll: int, word_bytes: int) -> tuple[str, str, int]:
    """PTX that hands the first channel's words on once the words of all `unroll` channels have arrived.

    ptxas likes to save registers by moving every load down to its use, which leaves one load in flight instead of
    `unroll` and costs more than half of the bandwidth. Neither the order in PTX nor a barrier keeps it from that; a
    dependence of the first multiplication on every load does. `zero` is 0, which ptxas cannot know.

    Returns:
        instructions, constraints, and the number of consecutive words they work on, as `inline_asm_elementwise`
        takes them. Operands: 16 bytes of results, zeros, then 16 bytes of words per channel.
    """
    pack = 16 // word_bytes
    first_word = 4 + pack
    combined = "".join(f" xor.b32 w, w, ${first_word + 4 * step};" for step in range(1, unroll))
    handed_on = "".join(f" xor.b32 ${part}, ${first_word + part}, w;" for part in range(4))
    instructions = f"{{ .reg .b32 w; mov.b32 w, ${first_word};{combined} and.b32 w, w, $4;{handed_on} }}"
    return instructions, ",".join(4 * ["=r"] + (pack + 4 * unroll) * ["r"]), pack


@triton.jit
def hold(words, zero, HOLD: tl.constexpr):
    """The tuple of words read, once all of them have arrived, see `hold_instructions`."""
    if HOLD is not None:
        zeros = tl.zeros(words[0].shape, tl.int32) + zero
        first = tl.inline_asm_elementwise(
            HOLD[0], HOLD[1], (zeros,) + words, dtype=words[0].dtype, is_pure=True, pack=HOLD[2]
        )
        words = (first,) + words[1:]
    return words


@triton.jit
def read(pointers, word_mask, channel_mask):
    """What stands at `pointers`, zero where masked. Weights are used once, hence the first to leave the caches."""
    mask = word_mask
    if channel_mask is not None:
        mask = channel_mask if mask is None else mask & channel_mask
    if mask is None:
        return tl.load(pointers, eviction_policy="evict_first")
    else:
        return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")


@loads("dense")
@triton.jit
def load_dense(
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
