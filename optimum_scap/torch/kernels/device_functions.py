"""What the Triton kernels of this package are built from.

    keep_i = s_i |x_i - m| > t              in float32, strictly greater; NaN is kept; s_i = 1 where there is no scale
    y      = sum over kept i of (x_i - m) W[:, i]  +  bias

(SCAP, arXiv 2412.07174, section 3; `bias` holds the folded mode, b + m * W·1.)

A program owns a block of output columns and a slice of the input channels. It writes the indices of the slice's kept
channels to a list of its own (`list_kept_channels`) and walks that list (`accumulate_channels`), so that pruned
channels cost no instructions. Where channels come in groups that share scales, it walks the list group by group and
scales the sums of each. Every thread owns its columns alone: nothing is reduced across threads. A second kernel
adds the partial sums of the slices in a fixed order (`add_slices`). There is neither an atomic operation nor a
counter, hence nothing that two launches could share.
"""
# mypy: ignore-errors

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_inputs(LAUNCH_EARLY: tl.constexpr):
    """Programmatic dependent launch (compute capability >= 9.0): this program was placed on the GPU while the kernels
    in front of it were finishing. Goes on once their writes are visible, and lets the next kernel's programs in.
    """
    if LAUNCH_EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def choose(branch, values):
    """The element of the tuple `values` that belongs to `branch`; pointers must be of one type."""
    chosen = values[0]
    for number in tl.static_range(1, len(values)):
        chosen = tl.where(branch == number, values[number], chosen)
    return chosen


@triton.jit
def choose_each(branch, tuples):
    """As `choose`, of every tuple in the tuple `tuples`; a tuple."""
    chosen = ()
    for number in tl.static_range(len(tuples)):
        chosen += (choose(branch, tuples[number]),)
    return chosen


@triton.jit
def find_branch(program, out_features, BLOCK_N: tl.constexpr):
    """Of `program`: its branch, its block there, the branch's first column, and the number of all columns.

    The blocks of BLOCK_N columns of the branches, which have `out_features` columns each, follow each other.
    """
    branch = 0
    block = program
    first_column = 0
    first_block = 0
    all_features = out_features[0]
    for number in tl.static_range(1, len(out_features)):
        first_block += tl.cdiv(out_features[number - 1], BLOCK_N)
        behind = program >= first_block
        branch = tl.where(behind, number, branch)
        block = tl.where(behind, program - first_block, block)
        first_column = tl.where(behind, all_features, first_column)
        all_features += out_features[number]
    return branch, block, first_column, all_features


@triton.jit
def load_scale(scale, channels, mask):
    """`scale` is a pointer, and whether it counts; ones if not."""
    pointer, counts = scale
    return tl.load(pointer + channels, mask=mask & counts, other=1.0)


@triton.jit
def center(x, mode, threshold, scale):
    """x - m where kept, else 0; and which elements are kept. Both in float32; `scale` may be None."""
    centered = x.to(tl.float32) - mode
    distance = tl.abs(centered)
    if scale is not None:
        distance = distance * scale
    keep = (distance <= threshold) == 0
    return tl.where(keep, centered, 0.0), keep


@triton.jit
def columns_of(words, part, WORDS_PER_TILE: tl.constexpr, PARTS: tl.constexpr):
    """The output columns of this part of the words: see `KernelArguments`."""
    if WORDS_PER_TILE == 1:
        return words * PARTS + part
    else:
        return words // WORDS_PER_TILE * (WORDS_PER_TILE * PARTS) + part * WORDS_PER_TILE + words % WORDS_PER_TILE


@triton.jit
def _any_row_keeps(x, x_stride, channels, channel_count, threshold, mode, scale, ROWS: tl.constexpr):
    inside = channels < channel_count
    any_keeps = channels < 0
    scales = None
    if scale is not None:
        scales = load_scale(scale, channels, inside)
    for row in tl.static_range(ROWS):
        values = tl.load(x + row * x_stride + channels, mask=inside, other=0.0)
        _, keep = center(values, mode, threshold, scales)
        any_keeps = any_keeps | keep
    return (any_keeps & inside).to(tl.int32)


@triton.jit
def list_kept_channels(
    x,
    x_stride,
    channel_count,
    threshold,
    mode,
    scale,
    kept_list,
    group_ends,
    first,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    STEPS: tl.constexpr,
    PADDING: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Writes the channels that any of the rows of `x` keeps to `kept_list`, and PADDING zeros; returns their number.

    With one lane per thread only one prefix sum, of a number per lane, crosses threads. Without `group_ends` lane l
    looks at channels l, l + LANES, l + 2 LANES, ..., and its kept channels stand together in the list, behind those of
    lane l - 1. With `group_ends` lane l looks at neighboring channels, the list is in order, and to `group_ends` goes
    where in the list each group of channels ends; `x` begins with channel `first` of all channels.
    """
    lanes = tl.arange(0, LANES)
    count = 0
    for start in range(0, channel_count, LANES * STEPS):
        kept_bits = tl.zeros([LANES], tl.int32)
        kept_by_lane = tl.zeros([LANES], tl.int32)
        for step in tl.static_range(STEPS):
            channels = start + (step * LANES + lanes if group_ends is None else lanes * STEPS + step)
            keep = _any_row_keeps(x, x_stride, channels, channel_count, threshold, mode, scale, ROWS)
            kept_bits |= keep << step
            kept_by_lane += keep
        position = count + tl.cumsum(kept_by_lane, 0) - kept_by_lane
        for step in tl.static_range(STEPS):
            keep = (kept_bits >> step) & 1
            channels = start + (step * LANES + lanes if group_ends is None else lanes * STEPS + step)
            if group_ends is not None:
                begins = ((first + channels) % GROUP_SIZE == 0) & (channels > 0) & (channels < channel_count)
                number = (first + channels) // GROUP_SIZE - first // GROUP_SIZE - 1
                tl.store(group_ends + number, position, mask=begins)
            tl.store(kept_list + position, channels.to(kept_list.dtype.element_ty), mask=keep == 1)
            position += keep
        count += tl.sum(kept_by_lane, 0)
    tl.store(kept_list + count + tl.arange(0, PADDING), tl.zeros([PADDING], kept_list.dtype.element_ty))
    if group_ends is not None:
        tl.store(group_ends + (first + channel_count - 1) // GROUP_SIZE - first // GROUP_SIZE, count)
    # What one thread wrote to the list is read by others.
    tl.debug_barrier()
    return count


@triton.jit
def zeros(COUNT: tl.constexpr, SIZE: tl.constexpr):
    """A tuple of COUNT tensors `[SIZE]`, float32."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (tl.zeros([SIZE], tl.float32),)
    return sums


@triton.jit
def add_each(first, second):
    """Sums of two tuples, element by element."""
    sums = ()
    for index in tl.static_range(len(first)):
        sums += (first[index] + second[index],)
    return sums


@triton.jit
def _load_rows(x, x_stride, scale, channel, ROWS: tl.constexpr):
    """The value of `channel` in each row, and its scale where it is needed again."""
    loaded = ()
    for row in tl.static_range(ROWS):
        loaded += (tl.load(x + row * x_stride + channel),)
    if ROWS > 1 and scale is not None:
        loaded += (load_scale(scale, channel, True),)
    return loaded


@triton.jit
def _kept_of_rows(loaded, listed, threshold, mode, ROWS: tl.constexpr):
    """x - m of each row where it is kept, else 0; the list holds what any of the rows keeps."""
    kept = ()
    for row in tl.static_range(ROWS):
        if ROWS == 1:
            centered = loaded[row].to(tl.float32) - mode
        elif len(loaded) > ROWS:
            centered, _ = center(loaded[row], mode, threshold, loaded[ROWS])
        else:
            centered, _ = center(loaded[row], mode, threshold, None)
        kept += (tl.where(listed, centered, 0.0),)
    return kept


@triton.jit
def _add_products(sums, kept, parts, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """Products of each row with each part of the words, then the sums of what was kept of the rows."""
    added = ()
    for row in tl.static_range(ROWS):
        for part in tl.static_range(PARTS):
            added += (tl.fma(parts[part], kept[row], sums[row * PARTS + part]),)
    for row in tl.static_range(ROWS):
        added += (sums[ROWS * PARTS + row] + kept[row],)
    return added


@triton.jit
def accumulate_channels(
    x,
    x_stride,
    threshold,
    mode,
    scale,
    kept_list,
    count,
    weights,
    strides,
    first,
    words,
    word_mask,
    zero,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    UNROLL: tl.constexpr,
    HOLD: tl.constexpr,
    READ: tl.constexpr,
    UNPACK: tl.constexpr,
    CONSTANTS: tl.constexpr,
):
    """Sums (x_i - m) * parts of W[words, first + i] over the channels i of `kept_list`. A tuple: a tensor like `words`
    per row and part, and the sum of x_i - m per row.

    UNROLL channels are loaded together. Behind the end of the list stand zeros: channel 0 is loaded and not added.
    2 * UNROLL elements behind the end must be readable. The weights are read as `load` says.
    """
    sums = zeros(ROWS * PARTS, words.shape[0])
    for _ in tl.static_range(ROWS):
        sums += (tl.full((), 0.0, tl.float32),)
    next_channels = ()
    for step in tl.static_range(UNROLL):
        next_channels += (tl.load(kept_list + step),)
    for start in range(0, count, UNROLL):
        channels = next_channels
        next_channels = ()
        loaded = ()
        for step in tl.static_range(UNROLL):
            loaded += (_load_rows(x, x_stride, scale, channels[step].to(tl.int32), ROWS),)
            next_channels += (tl.load(kept_list + start + UNROLL + step),)
        read = READ(weights, strides, first, channels, words, word_mask, None, zero, HOLD, CONSTANTS)
        for step in tl.static_range(UNROLL):
            listed = start + step < count
            kept = _kept_of_rows(loaded[step], listed, threshold, mode, ROWS)
            sums = _add_products(sums, kept, UNPACK(read[step], zero, CONSTANTS), ROWS, PARTS)
    return sums


@triton.jit
def add_slices(partial, slice_stride, slices, columns, inside, SLICES_CEIL: tl.constexpr):
    """Sum over the slices of `partial[slice, columns]`, always in the same order."""
    rows = tl.arange(0, SLICES_CEIL)
    pointers = partial + rows[:, None] * slice_stride + columns[None, :]
    return tl.sum(tl.load(pointers, mask=(rows < slices)[:, None] & inside[None, :], other=0.0), 0)
