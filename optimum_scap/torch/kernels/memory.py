"""Reading weights, so that as many loads as possible are under way."""
# mypy: ignore-errors

import triton
import triton.language as tl


def hold_instructions(unroll: int, word_bytes: int, lane_bytes: int = 16) -> tuple[str, str, int]:
    """PTX that hands the first channel's words on once the words of all `unroll` channels have arrived.

    ptxas likes to save registers by moving every load down to its use, which leaves one load in flight instead of
    `unroll` and costs more than half of the bandwidth. Neither the order in PTX nor a barrier keeps it from that; a
    dependence of the first multiplication on every load does. `zero` is 0, which ptxas cannot know.

    Returns:
        instructions, constraints, and the number of consecutive words they work on, as `inline_asm_elementwise`
        takes them. Operands: `lane_bytes` of results, zeros, then `lane_bytes` of words per channel.
    """
    pack = lane_bytes // word_bytes
    registers = lane_bytes // 4
    first_word = registers + pack
    combined = "".join(f" xor.b32 w, w, ${first_word + registers * step};" for step in range(1, unroll))
    handed_on = "".join(f" xor.b32 ${part}, ${first_word + part}, w;" for part in range(registers))
    instructions = f"{{ .reg .b32 w; mov.b32 w, ${first_word};{combined} and.b32 w, w, ${registers};{handed_on} }}"
    return instructions, ",".join(registers * ["=r"] + (pack + registers * unroll) * ["r"]), pack


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
