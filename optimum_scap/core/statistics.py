"""Streamed statistics of the activations that enter a fully connected layer.

SCAP (arXiv 2412.07174, section 3) needs two numbers per layer: the mode m of the input activations, and the
threshold t, the quantile of |x - m| at the target sparsity. Both are taken from one quantile sketch of the signed
activations, so that one pass over the data serves every mode and every sparsity, and memory does not grow with it.
With a scale per channel the threshold is a quantile of s |x - m|, which has a sketch of its own, for one m.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import SCAPError
from .config import Estimator
from .criterion import Criterion


if TYPE_CHECKING:
    from numpy.typing import NDArray


# Values per doubling of the stream that are sorted. A random sample of n values has ranks with a standard deviation of
# at most 0.5 / sqrt(n), here 0.00025 of the count.
_KEPT_PER_DOUBLING = 1 << 22
_SORTED_AT_ONCE = 1 << 22


class QuantileSketch:
    """Sketch of a stream of float32 values that answers quantile queries within a bounded rank error.

    A KLL sketch (Karnin, Lang, Liberty: "Optimal Quantile Approximation in Streams", 2016) with equal capacities: a
    level-h value stands for 2^h values of the stream; a full level is sorted and every second value, from a random
    start, moves up. With the default capacity the standard deviation of a rank is below 0.0002 of the count, whatever
    the distribution, since only the order of the values matters. Kept values are values that were seen.

    Long streams are thinned out before they are sorted, which would dominate a calibration. While the stream is short
    every value counts. Of later values one out of every 2^k neighbors is drawn, such that every doubling of the stream
    adds the same number of values.

    Args:
        capacity: values kept per level; memory is about 4 * capacity * log2(count / capacity) bytes.
        seed: seed of the random starts.
    """

    def __init__(self, capacity: int = 8192, seed: int = 0) -> None:
        self._capacity = capacity
        self._rng = np.random.default_rng(seed)
        self._levels: list[list[Any]] = []
        self.count = 0

    def add(self, values: Any) -> None:
        """Adds all elements of `values` (any shape and float type, finite)."""
        flat = values.reshape(-1)
        for start in range(0, flat.shape[0], _SORTED_AT_ONCE):
            chunk = flat[start : start + _SORTED_AT_ONCE]
            thinning = max(0, ((self.count + chunk.shape[0]) // _KEPT_PER_DOUBLING).bit_length() - 1)
            whole = chunk.shape[0] >> thinning << thinning
            self._add_all(self._draw(chunk[:whole], 1 << thinning), thinning)
            self._add_all(chunk[whole:], 0)

    def _add_all(self, values: Any, weight_level: int) -> None:
        """Adds values `[count]`, each standing for 2^weight_level values of the stream."""
        values = self._sort([values])
        size = values.shape[0]
        if size == 0:
            return
        self.count += size << weight_level
        level = max(0, int(np.ceil(np.log2(size / self._capacity))))
        self._insert(weight_level + level, self._take(values, int(self._rng.integers(1 << level)), 1 << level))

    def weighted_values(self) -> tuple["NDArray[np.float32]", "NDArray[np.float64]"]:
        """The kept values, sorted, and how many values of the stream each stands for. Both are 1-D."""
        kept = [(level, chunk) for level, chunks in enumerate(self._levels) for chunk in chunks]
        if not kept:
            raise SCAPError("no values were added, there is nothing to take a quantile of")
        values = self._as_array([chunk for _, chunk in kept])
        weights = np.concatenate([np.full(chunk.shape[0], 2.0**level) for level, chunk in kept])
        order = np.argsort(values, kind="stable")
        return values[order], weights[order]

    def _insert(self, level: int, chunk: Any) -> None:
        while len(self._levels) <= level:
            self._levels.append([])
        self._levels[level].append(chunk)
        if sum(kept.shape[0] for kept in self._levels[level]) > 2 * self._capacity:
            merged = self._sort(self._levels[level])
            self._levels[level] = []
            if merged.shape[0] % 2:  # the odd one out stays, so that the total weight is exact
                self._levels[level].append(self._take(merged, merged.shape[0] - 1, 1))
                merged = merged[:-1]
            self._insert(level + 1, self._take(merged, int(self._rng.integers(2)), 2))

    # What a backend replaces that keeps its chunks elsewhere than in numpy arrays.

    def _draw(self, values: Any, stride: int) -> Any:
        """A random one of every `stride` neighbors, float32."""
        if stride == 1:
            return values
        groups = np.arange(0, values.shape[0], stride)
        return values[groups + self._rng.integers(stride, size=groups.shape[0])]

    def _sort(self, chunks: list[Any]) -> Any:
        return np.sort(np.concatenate([chunk.reshape(-1) for chunk in chunks]))

    def _take(self, values: Any, start: int, step: int) -> Any:
        """A copy of every `step`-th value: a view would keep all the others in memory."""
        return values[start::step].copy()

    def _as_array(self, chunks: list[Any]) -> "NDArray[np.float32]":
        return np.concatenate(chunks)


def weighted_quantile(values: "NDArray[np.float32]", weights: "NDArray[np.float64]", fraction: float) -> np.float32:
    """The smallest of `values` (1-D) such that values <= it hold at least `fraction` of the total weight."""
    return np.float32(np.quantile(values, fraction, weights=weights, method="inverted_cdf"))


class ActivationStatistics:
    """Statistics of the input of one layer, or of several that read it, fed batch by batch.

    Args:
        name: name of the layer, for error messages.
        seed: seed of the sketches.
        scale: the criterion's scale per channel, float32 `[in_features]`, or None.
        mode: with a scale, the mode for which a threshold is looked for.
    """

    sketch: type[QuantileSketch] = QuantileSketch

    def __init__(
        self,
        name: str,
        seed: int = 0,
        scale: "NDArray[np.float32] | None" = None,
        mode: np.float32 = np.float32(0.0),  # noqa: B008  an immutable number
    ) -> None:
        self.name = name
        self._criterion = Criterion(mode, np.float32(0.0), scale)
        self._sketch = self.sketch(seed=seed)
        self._scores = None if scale is None else self.sketch(seed=seed)
        self._sum = 0.0
        self._largest = 0.0

    def add(self, activations: "NDArray[np.float32]") -> None:
        """Adds the activations of one batch (float32, `[..., in_features]`).

        Raises:
            SCAPError: naming the layer, if a value is NaN or infinite.
        """
        activations = np.asarray(activations, dtype=np.float32)
        if activations.size == 0:
            return
        largest = max(float(activations.max()), -float(activations.min()))
        self._check_finite(largest)
        self._largest = max(self._largest, largest)
        self._sum += float(activations.sum())  # pairwise
        self._sketch.add(activations)
        if self._scores is not None:
            self._scores.add(self._criterion.scores(activations))

    @property
    def count(self) -> int:
        """How many values were added."""
        return self._sketch.count

    @property
    def all_zero(self) -> bool:
        """Whether every value that was added is zero."""
        return self._largest == 0.0

    def solve(self, estimator: Estimator, sparsity: float) -> Criterion:
        """The criterion that prunes the fraction `sparsity` of the values.

        Without a scale for the mode that `estimator` gives, with one for the mode that was given.

        Raises:
            SCAPError: naming the layer, if nothing was added or every value was zero.
        """
        if self._sketch.count == 0:
            raise SCAPError(f"layer {self.name}: no activations were seen, the calibration data never reached it")
        if self._largest == 0.0:
            raise SCAPError(
                f"layer {self.name}: all of its input activations are zero on the calibration data, so no threshold "
                "can be found; exclude the layer or calibrate on other data"
            )
        if self._scores is not None:
            threshold = weighted_quantile(*self._scores.weighted_values(), sparsity)
            return Criterion(self._criterion.mode, threshold, self._criterion.scale)
        values, weights = self._sketch.weighted_values()
        mode = self._mode(estimator, sparsity, values, weights)
        return Criterion(mode, weighted_quantile(np.abs(values - mode), weights, sparsity))

    def mode(self, estimator: Estimator, sparsity: float) -> np.float32:
        """The mode of the values."""
        return self._mode(estimator, sparsity, *self._sketch.weighted_values())

    def sparsity(self, criterion: Criterion) -> float:
        """The fraction of the values that `criterion` prunes; with a scale, for the mode that was given."""
        if self._scores is not None:
            scores, weights = self._scores.weighted_values()
            pruned = scores <= criterion.threshold
        else:
            values, weights = self._sketch.weighted_values()
            pruned = criterion.prunes(values)
        return float(weights[pruned].sum() / weights.sum())

    def distribution(self, criterion: Criterion) -> tuple["NDArray[np.float32]", "NDArray[np.float64]"]:
        """What is compared with the threshold of `criterion`, sorted, and the fraction that is not above each."""
        if self._scores is not None:
            scores, weights = self._scores.weighted_values()
        else:
            values, weights = self._sketch.weighted_values()
            scores = criterion.scores(values)
            order = np.argsort(scores, kind="stable")
            scores, weights = scores[order], weights[order]
        cumulative = np.cumsum(weights)
        return scores, cumulative / cumulative[-1]

    def _check_finite(self, largest: float) -> None:
        if not np.isfinite(largest):
            raise SCAPError(
                f"layer {self.name}: its input activations contain NaN or infinite values on the calibration data; "
                "check the model in this precision, or exclude the layer"
            )

    def _mode(
        self, estimator: Estimator, sparsity: float, values: "NDArray[np.float32]", weights: "NDArray[np.float64]"
    ) -> np.float32:
        if estimator == "zero":
            return np.float32(0.0)
        if estimator == "mean":
            return np.float32(self._sum / self._sketch.count)
        if estimator == "median":
            return weighted_quantile(values, weights, 0.5)
        return _kde_mode(sparsity, values, weights)


def _kde_mode(sparsity: float, values: "NDArray[np.float32]", weights: "NDArray[np.float64]") -> np.float32:
    """Peak of a Gaussian kernel density estimate; of several bandwidths, the one that prunes the least energy.

    The error of the layer's output is W applied to the pruned residual (x - m), so the candidate with the smallest
    sum of (x - m)^2 over the pruned values is the one with the smallest output error for weights without structure.
    """
    from scipy.stats import gaussian_kde

    cumulative = (np.cumsum(weights) - 0.5 * weights) / weights.sum()
    # The tails hold no peak but would widen the bandwidth, which follows the standard deviation.
    points = np.interp(np.linspace(0.005, 0.995, 2000), cumulative, values.astype(np.float64))
    if points[0] == points[-1]:
        return np.float32(points[0])
    grid = np.linspace(points[0], points[-1], 513)
    scott = gaussian_kde(points).factor
    best_mode, least_energy = np.float32(0.0), np.inf
    for factor in (scott, 0.5 * scott, 0.25 * scott):
        density = gaussian_kde(points, bw_method=factor)(grid)
        mode = np.float32(grid[int(np.argmax(density))])
        residuals = np.abs(values - mode)
        pruned = residuals <= weighted_quantile(residuals, weights, sparsity)
        energy = float((weights[pruned] * residuals[pruned].astype(np.float64) ** 2).sum())
        if energy < least_energy:
            best_mode, least_energy = mode, energy
    return best_mode
