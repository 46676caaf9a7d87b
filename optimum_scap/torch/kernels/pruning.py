"""The Triton kernel that prunes the input of an ordinary matrix product, launched by `launch_pruning`."""
# mypy: ignore-errors

import triton
import triton.language as tl

from .device_functions import center, wait_for_inputs


@triton.jit
def prune_input_kernel(
    x,
    scale,
    out,
    in_features,
    threshold,
    mode,
    fill,
    HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    """out[row, channels] = x where kept, else `fill`, the mode in the type of x; programs [rows; channel blocks]."""
    wait_for_inputs(LAUNCH_EARLY)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < in_features
    at = tl.program_id(0).to(tl.int64) * in_features + channels
    values = tl.load(x + at, mask=inside, other=0.0)
    scales = tl.load(scale + channels, mask=inside, other=1.0) if HAS_SCALE else None
    _, keep = center(values, mode, threshold, scales)
    fills = tl.zeros([BLOCK], tl.float32) + fill
    tl.store(out + at, tl.where(keep, values, fills.to(values.dtype)), mask=inside)
