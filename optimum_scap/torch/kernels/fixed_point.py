"""Products of one row with integer weights, in integers.

    f_i = round(x_i' / u)            x_i' = x_i - m where kept, u a power of two for which |f_i| < 2^22
    f_i = 65536 h_i + 256 m_i + l_i  digits of 8 bits, of which h is signed
    sum over i of x_i' q_i = u (65536 sum h_i q_i + 256 sum m_i q_i + sum l_i q_i)

The sums over the channels of a slice are exact, and rounding x to u, 2^-22 of the largest x of the slice at the most,
changes no more than adding up in float32 does. An instruction multiplies four bytes with four bytes and adds them up
(`dp4a`), so that a weight takes 1.1 instructions where converting it and multiplying in float32 takes three: with
four bits to a weight, those three would take longer than reading it.

An infinite or NaN input makes all outputs NaN.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from .device_functions import center, load_scale
from .memory import hold, read


# Largest slice whose sums fit 32 bits: 2^15 channels times 255 * 255.
MAX_CHANNELS = 1 << 15


@triton.jit
def _unit_of(largest):
    """u and 1 / u for numbers of up to this magnitude, the bits of a float32; NaN and 0 if it is infinite or NaN."""
    exponent = largest >> 23
    bounded = tl.maximum(exponent, 22)
    unit = ((bounded - 21) << 23).to(tl.float32, bitcast=True)
    inverse = ((275 - bounded) << 23).to(tl.float32, bitcast=True)
    finite = exponent < 255
    return tl.where(finite, unit, float("nan")), tl.where(finite, inverse, 0.0)


@triton.jit
def _look_at(x, channels, channel_count, threshold, mode, scale):
    """x - m of the channels, whether they are kept, and the bits of its magnitude if so, which are ordered as the
    magnitudes are, and NaN last.
    """
    inside = channels < channel_count
    scales = None
    if scale is not None:
        scales = load_scale(scale, channels, inside)
    centered, keep = center(tl.load(x + channels, mask=inside, other=0.0), mode, threshold, scales)
    keep = keep & inside
    return centered, keep, tl.where(keep, tl.abs(centered).to(tl.int32, bitcast=True), 0)


@triton.jit
def _larger_and_sum(largest, count, other_largest, other_count):
    return tl.maximum(largest, other_largest), count + other_count


@triton.jit
def _lane_channels(lanes, start, step, LANES: tl.constexpr, STEPS: tl.constexpr, IN_ORDER: tl.constexpr):
    if IN_ORDER:
        return start + lanes * STEPS + step
    else:
        return start + step * LANES + lanes


@triton.jit
def _write_entries(
    entries,
    row_words,
    group_ends,
    first,
    channels,
    channel_count,
    centered,
    keep,
    inverse,
    position,
    GROUP_SIZE: tl.constexpr,
):
    if group_ends is not None:
        begins = ((first + channels) % GROUP_SIZE == 0) & (channels > 0) & (channels < channel_count)
        tl.store(group_ends + (first + channels) // GROUP_SIZE - first // GROUP_SIZE - 1, position, mask=begins)
    scaled = tl.where(inverse > 0.0, centered * inverse, 0.0)
    value = tl.floor(scaled + 0.5).to(tl.int64)
    tl.store(entries + position, (value << 32) | channels.to(tl.int64) * row_words, mask=keep)


@triton.jit
def list_in_fixed_point(
    x,
    channel_count,
    threshold,
    mode,
    scale,
    entries,
    row_words,
    group_ends,
    first,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    PADDING: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    """As `list_kept_channels`, of one row. An entry of 64 bits holds f of a channel, and below it, in 32 bits, the
    number of words of W in front of the channel, of which a channel has `row_words`.

    Returns:
        the number of entries, and u. ONE_PASS: there are no more than LANES * STEPS channels.
    """
    IN_ORDER: tl.constexpr = group_ends is not None
    lanes = tl.arange(0, LANES)
    largest = tl.zeros([LANES], tl.int32)
    kept = tl.zeros([LANES], tl.int32)
    if ONE_PASS:
        seen = ()
        for step in tl.static_range(STEPS):
            channels = _lane_channels(lanes, 0, step, LANES, STEPS, IN_ORDER)
            centered, keep, bits = _look_at(x, channels, channel_count, threshold, mode, scale)
            seen += (centered, keep)
            largest = tl.maximum(largest, bits)
            kept += keep.to(tl.int32)
        position = tl.cumsum(kept, 0) - kept
        largest_of_all, count = tl.reduce((largest, kept), 0, _larger_and_sum)
        unit, inverse = _unit_of(largest_of_all)
        for step in tl.static_range(STEPS):
            channels = _lane_channels(lanes, 0, step, LANES, STEPS, IN_ORDER)
            centered = seen[2 * step]
            keep = seen[2 * step + 1]
            _write_entries(
                entries,
                row_words,
                group_ends,
                first,
                channels,
                channel_count,
                centered,
                keep,
                inverse,
                position,
                GROUP_SIZE,
            )
            position += keep.to(tl.int32)
    else:
        for start in range(0, channel_count, LANES * STEPS):
            for step in tl.static_range(STEPS):
                channels = _lane_channels(lanes, start, step, LANES, STEPS, IN_ORDER)
                _, _, bits = _look_at(x, channels, channel_count, threshold, mode, scale)
                largest = tl.maximum(largest, bits)
        unit, inverse = _unit_of(tl.max(largest, 0))
        count = 0
        for start in range(0, channel_count, LANES * STEPS):
            kept = tl.zeros([LANES], tl.int32)
            for step in tl.static_range(STEPS):
                channels = _lane_channels(lanes, start, step, LANES, STEPS, IN_ORDER)
                _, keep, _ = _look_at(x, channels, channel_count, threshold, mode, scale)
                kept += keep.to(tl.int32)
            position = count + tl.cumsum(kept, 0) - kept
            for step in tl.static_range(STEPS):
                channels = _lane_channels(lanes, start, step, LANES, STEPS, IN_ORDER)
                centered, keep, _ = _look_at(x, channels, channel_count, threshold, mode, scale)
                _write_entries(
                    entries,
                    row_words,
                    group_ends,
                    first,
                    channels,
                    channel_count,
                    centered,
                    keep,
                    inverse,
                    position,
                    GROUP_SIZE,
                )
                position += keep.to(tl.int32)
            count += tl.sum(kept, 0)
    tl.store(entries + count + tl.arange(0, PADDING), tl.zeros([PADDING], tl.int64))
    if group_ends is not None:
        tl.store(group_ends + (first + channel_count - 1) // GROUP_SIZE - first // GROUP_SIZE, count)
    # What one thread wrote to the list is read by others.
    tl.debug_barrier()
    return count, unit


@triton.jit
def _permute_bytes(a, b, SELECTOR: tl.constexpr, NATIVE: tl.constexpr):
    """Of the bytes 0 to 3 of a and 4 to 7 of b those that the hexadecimal digits name, the last digit's lowest."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,n", [a, b, SELECTOR], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        permuted = (a & 0) | (b & 0)
        for place in tl.static_range(4):
            number = (SELECTOR >> (4 * place)) & 7
            source = a if number < 4 else b
            permuted |= ((source >> (8 * (number % 4))) & 255) << (8 * place)
        return permuted


@triton.jit
def _dot(weights, digits, total, SIGNED: tl.constexpr, NATIVE: tl.constexpr):
    """total + the sum of products of the four bytes of both; those of `weights` are unsigned."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;" if SIGNED else "dp4a.u32.u32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [weights, digits, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        for place in tl.static_range(4):
            digit = (digits >> (8 * place)) & 255
            if SIGNED:
                digit = (digit ^ 128) - 128
            total += ((weights >> (8 * place)) & 255) * digit
        return total


@triton.jit
def _transpose_bytes(a, b, c, d, NATIVE: tl.constexpr):
    """Byte 0 of a, b, c, d in one word, byte 1 in the next, and so on."""
    ab_low, ab_high = _permute_bytes(a, b, 0x5140, NATIVE), _permute_bytes(a, b, 0x7362, NATIVE)
    cd_low, cd_high = _permute_bytes(c, d, 0x5140, NATIVE), _permute_bytes(c, d, 0x7362, NATIVE)
    return (
        _permute_bytes(ab_low, cd_low, 0x5410, NATIVE),
        _permute_bytes(ab_low, cd_low, 0x7632, NATIVE),
        _permute_bytes(ab_high, cd_high, 0x5410, NATIVE),
        _permute_bytes(ab_high, cd_high, 0x7632, NATIVE),
    )


@triton.jit
def _add_four_channels(sums, words, values, BITS: tl.constexpr, NATIVE: tl.constexpr):
    digits = _transpose_bytes(values[0], values[1], values[2], values[3], NATIVE)
    bytes_of = _transpose_bytes(words[0], words[1], words[2], words[3], NATIVE)
    added = ()
    for number in tl.static_range(4):
        for digit in tl.static_range(3):
            total = sums[3 * number + digit]
            added += (_dot(bytes_of[number], digits[digit], total, digit == 2, NATIVE),)
    if BITS == 4:
        for number in tl.static_range(4):
            upper = bytes_of[number] & -0x0F0F0F10  # 0xF0F0F0F0
            for digit in tl.static_range(3):
                total = sums[12 + 3 * number + digit]
                added += (_dot(upper, digits[digit], total, digit == 2, NATIVE),)
    for digit in tl.static_range(3):
        ones = digits[digit] * 0 + 0x01010101
        added += (_dot(ones, digits[digit], sums[len(sums) - 3 + digit], digit == 2, NATIVE),)
    return added


@triton.jit
def accumulate_fixed_point(
    entries,
    count,
    weights,
    word_mask,
    zero,
    UNROLL: tl.constexpr,
    HOLD: tl.constexpr,
    BITS: tl.constexpr,
    WORDS_PER_TILE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Sums of f_i times the integers of W over the channels i of `entries`: of each byte of the words, then of the
    upper half of each byte if integers have four bits, then of f_i alone, all three sums of digits, lowest first.

    UNROLL channels, a multiple of 4, are loaded together. 2 * UNROLL entries behind the last must be readable; PADDED
    says that the first UNROLL of them are zero. `weights` points to the words of the first channel of the slice.
    """
    NATIVE: tl.constexpr = HOLD is not None
    sums = ()
    for _ in tl.static_range(12 * (8 // BITS)):
        sums += (tl.zeros(weights.shape, tl.int32),)
    for _ in tl.static_range(3):
        sums += (tl.full((), 0, tl.int32),)
    following = ()
    for step in tl.static_range(UNROLL):
        following += (tl.load(entries + step),)
    for start in range(0, count, UNROLL):
        values = ()
        words = ()
        for step in tl.static_range(UNROLL):
            entry = following[step]
            if not PADDED:
                entry = tl.where(start + step < count, entry, 0)
            values += ((entry >> 32).to(tl.int32),)
            # Rows begin with a tile, which is what lets a thread load several words at once.
            offset = tl.multiple_of(entry.to(tl.uint32), WORDS_PER_TILE)
            words += (read(weights + offset, word_mask, None),)
        following = ()
        for step in tl.static_range(UNROLL):
            following += (tl.load(entries + start + UNROLL + step),)
        words = hold(words, zero, HOLD)
        for step in tl.static_range(0, UNROLL, 4):
            four_words = (words[step], words[step + 1], words[step + 2], words[step + 3])
            four_values = (values[step], values[step + 1], values[step + 2], values[step + 3])
            sums = _add_four_channels(sums, four_words, four_values, BITS, NATIVE)
    return sums


@triton.jit
def _number(low, middle, high, SMALL: tl.constexpr):
    """SMALL: the lower two fit one number of 32 bits."""
    upper = high.to(tl.float32) * 65536.0
    if SMALL:
        return upper + (middle * 256 + low).to(tl.float32)
    else:
        return upper + (middle.to(tl.float32) * 256.0 + low.to(tl.float32))


@triton.jit
def scale_fixed_point(sums, unit, scales, CONSTANTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of what `accumulate_fixed_point` returned, over up to CHANNELS channels: the sums of x * weights, see
    `load.apply_integer_scales`.
    """
    BITS: tl.constexpr = CONSTANTS[0]
    PARTS: tl.constexpr = 32 // BITS
    # 255 * 256 times the largest difference of an integer and a zero point, 255.
    SMALL: tl.constexpr = CHANNELS <= 128
    totals = ()
    for part in tl.static_range(PARTS):
        digits = ()
        for digit in tl.static_range(3):
            x_sum = sums[len(sums) - 3 + digit]
            if BITS == 8:
                total = sums[3 * part + digit]
            elif part < 4:
                total = sums[3 * part + digit] - sums[12 + 3 * part + digit]
            else:
                total = sums[3 * part + digit] >> 4  # a multiple of 16
            if CONSTANTS[2] == "none":
                total -= x_sum * (1 << (BITS - 1))
            elif CONSTANTS[2] == "integers":
                total -= x_sum * scales[PARTS + part].to(tl.int32)
            digits += (total,)
        total = _number(digits[0], digits[1], digits[2], SMALL) * unit * scales[part].to(tl.float32)
        if CONSTANTS[2] == "offsets":
            x_sum = _number(sums[len(sums) - 3], sums[len(sums) - 2], sums[len(sums) - 1], False) * unit
            total += x_sum * scales[PARTS + part].to(tl.float32)
        totals += (total,)
    return totals
