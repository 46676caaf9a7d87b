"""Streamed statistics of activations that stay on the device where they are: no copy to the host, no synchronization.

What is decided along the way (how much to thin out, when to merge) depends on the number of values alone, which the
host knows; the values themselves are read once, when a pass over the calibration data is over.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.config import Estimator
from ..core.criterion import Criterion
from ..core.statistics import ActivationStatistics, QuantileSketch


if TYPE_CHECKING:
    from numpy.typing import NDArray


class TorchQuantileSketch(QuantileSketch):
    """The same sketch over torch tensors."""

    def __init__(self, capacity: int = 8192, seed: int = 0) -> None:
        super().__init__(capacity, seed)
        self._seed = seed
        self._generator: torch.Generator | None = None

    def add(self, values: Tensor) -> None:
        super().add(values.detach())

    def _draw(self, values: Tensor, stride: int) -> Tensor:
        if stride == 1:
            return values
        if self._generator is None or self._generator.device != values.device:
            self._generator = torch.Generator(values.device).manual_seed(self._seed)
        groups = values.view(-1, stride)
        picks = torch.randint(stride, (groups.shape[0], 1), device=values.device, generator=self._generator)
        return groups.gather(1, picks).squeeze(1)

    def _sort(self, chunks: list[Any]) -> Tensor:
        device = chunks[0].device
        merged = torch.cat([chunk.reshape(-1).to(device, torch.float32) for chunk in chunks])
        if device.type == "cpu":  # torch sorts indices along, numpy only the values, ten times as fast
            return torch.from_numpy(np.sort(merged.numpy()))
        return merged.sort().values

    def _take(self, values: Any, start: int, step: int) -> Tensor:
        return values[start::step].clone()

    def _as_array(self, chunks: list[Any]) -> "NDArray[np.float32]":
        return np.concatenate([chunk.cpu().numpy() for chunk in chunks])


class TorchActivationStatistics(ActivationStatistics):
    """ActivationStatistics of torch tensors on any device."""

    sketch = TorchQuantileSketch

    def __init__(
        self,
        name: str,
        seed: int = 0,
        scale: "NDArray[np.float32] | None" = None,
        mode: np.float32 = np.float32(0.0),  # noqa: B008  an immutable number
    ) -> None:
        super().__init__(name, seed, scale, mode)
        self._device_sum: Tensor | None = None
        self._device_largest: Tensor | None = None
        self._device_scale: Tensor | None = None

    def add(self, activations: Tensor) -> None:  # type: ignore[override]
        """Adds the activations of one batch (any float dtype, any shape). NaN and inf are reported by `solve`."""
        if activations.numel() == 0:
            return
        activations = activations.detach()
        largest = activations.abs().amax().float()
        total = activations.sum(dtype=torch.float32)
        if self._device_sum is None or self._device_largest is None:
            double = total.device.type != "mps"  # which has no float64
            self._device_sum, self._device_largest = total.double() if double else total, largest
        else:
            device = self._device_sum.device
            self._device_sum = self._device_sum + total.to(device)
            self._device_largest = torch.maximum(self._device_largest, largest.to(device))
        self._sketch.add(activations)
        if self._scores is not None:
            self._scores.add(self._scores_of(activations))

    def _scores_of(self, activations: Tensor) -> Tensor:
        if self._device_scale is None or self._device_scale.device != activations.device:
            self._device_scale = torch.tensor(self._criterion.scale, device=activations.device)
        return (activations.float() - float(self._criterion.mode)).abs() * self._device_scale

    @property
    def all_zero(self) -> bool:
        self._read()
        return super().all_zero

    def solve(self, estimator: Estimator, sparsity: float) -> Criterion:
        """See ActivationStatistics.

        Raises:
            SCAPError: naming the layer, if nothing was added, every value was zero, or one was NaN or infinite.
        """
        self._read()
        return super().solve(estimator, sparsity)

    def mode(self, estimator: Estimator, sparsity: float) -> np.float32:
        self._read()
        return super().mode(estimator, sparsity)

    def _read(self) -> None:
        if self._device_sum is not None and self._device_largest is not None:
            self._largest = float(self._device_largest)
            self._check_finite(self._largest)
            self._sum = float(self._device_sum)
