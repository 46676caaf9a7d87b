"""The criterion by which an input channel is kept, the formula of SCAP (arXiv 2412.07174, section 3), executable.

    keep_i = s_i * |x_i - mode| > threshold       compared in float32, strictly greater; NaN is kept
    y      = sum over kept i of (x_i - mode) W[:, i]  +  b + mode * W·1

s_i is 1 where there is no scale. Every consumer (threshold operations, kernels, layers) takes a criterion whole.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Criterion:
    """What one input is compared with.

    Args:
        mode: the value that a pruned activation stands for, float32.
        threshold: what a kept one exceeds, float32; below zero every channel is kept.
        scale: None, or a factor per input channel, float32 `[in_features]`, finite and not negative.
    """

    mode: np.float32
    threshold: np.float32
    scale: "NDArray[np.float32] | None" = None

    @cached_property
    def key(self) -> tuple[float, float, bytes | None]:
        """Equal for criteria that keep the same channels of every input."""
        return float(self.mode), float(self.threshold), None if self.scale is None else self.scale.tobytes()

    def scores(self, x: "NDArray[np.float32]") -> "NDArray[np.float32]":
        """What of `x` `[..., in_features]` is compared with the threshold."""
        distance = np.abs(x - np.float32(self.mode))
        return distance if self.scale is None else distance * self.scale

    def prunes(self, x: "NDArray[np.float32]") -> "NDArray[np.bool_]":
        """Which elements of `x` `[..., in_features]` are pruned."""
        return self.scores(x) <= np.float32(self.threshold)


KEEP_ALL = Criterion(np.float32(0.0), np.float32(-1.0))
