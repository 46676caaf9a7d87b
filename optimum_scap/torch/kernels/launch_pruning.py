"""Launches the kernel that prunes an input: `library.prune_input` on a GPU."""

from functools import cache

import torch
import triton
from torch import Tensor

from .launch import _early_launch, _on_device
from .pruning import prune_input_kernel
from .reference import check_scale


BLOCK = 1024


def prune_input(x: Tensor, threshold: float, mode: float, scale: Tensor | None) -> Tensor:
    """See `reference.prune_input`: one launch instead of one for each elementwise operation."""
    check_scale(x, scale)
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    in_features = x.shape[-1]
    with _on_device(x):
        prune_input_kernel[(x.numel() // in_features, triton.cdiv(in_features, BLOCK))](
            x,
            x if scale is None else scale,
            out,
            in_features,
            threshold,
            float(mode),
            _rounded(mode, x.dtype),
            HAS_SCALE=scale is not None,
            BLOCK=BLOCK,
            **_early_launch(x.device),
        )
    return out


@cache
def _rounded(mode: float, dtype: torch.dtype) -> float:
    # Not left to the kernel: Triton's interpreter rounds bfloat16 towards zero.
    return torch.tensor(mode, dtype=dtype).item()
