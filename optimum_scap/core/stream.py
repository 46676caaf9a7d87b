"""How calibration reads its samples.

Thresholds must hold while all other layers are sparse too (the reference calibrates each layer behind layers that are
already pruned). So criteria are put in force as soon as there are any, and are corrected while the data is read:

1. The lead-in: pieces of the first samples, each twice as long as the one before. The first runs dense, each of the
   others under the criteria that the one before it gave. What they saw is thrown away.
2. A pass over all samples with statistics of its own, under criteria that are solved anew each time that the number
   of samples has doubled. The last ones are the result.
3. If the criteria that were in force on the way prune another part of what the pass saw than the last ones do, on
   average more than SETTLED, step 2 is repeated. Few samples need that; 64 windows of text do not.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import SCAPError
from ..progress import ProgressBar, length
from .backend import Backend, Collector
from .criterion import KEEP_ALL, Criterion
from .statistics import ActivationStatistics
from .targets import Group
from .unreached import names_of, never_reached


if TYPE_CHECKING:
    from numpy.typing import NDArray


# By how much the sparsity in force may have been another than the final one, averaged over a pass. Layers pass only a
# small part of such a difference on to the layers behind them.
SETTLED = 0.01
# The lead-in takes up to this part of the samples, and no more than so many.
LEAD_IN_FRACTION = 1 / 8
LONGEST_LEAD_IN = 8
# What an allocation goes by: the statistics of so many samples on the dense model.
ALLOCATION_FRACTION = 1 / 4
LONGEST_ALLOCATION = 16
# Behind that many passes a mode stays what it is where the threshold has to be found for a given one.
MODE_PASSES = 1


class Stream:
    """The samples, read piece by piece under criteria that are corrected on the way."""

    def __init__(
        self,
        backend: Backend,
        collector: Collector,
        groups: list[Group],
        scales: "Mapping[str, NDArray[np.float32]]",
        samples: Iterable[Any],
        seed: int,
    ) -> None:
        self._backend = backend
        self._collector = collector
        self._scales = scales
        self._samples = samples
        self._seed = seed
        self._modes = {group.key: np.float32(0.0) for group in groups}
        self._statistics: dict[str, ActivationStatistics] = {}
        self._pooled: dict[str, ActivationStatistics] = {}
        self._pools = {group.key: group.pool for group in groups if group.pool is not None}
        self._enough = {group.key: group.enough for group in groups}
        self._empty = True
        self.groups = groups
        self.criteria: dict[str, Criterion] = {group.key: KEEP_ALL for group in groups}
        self.total = length(samples)

    def expected_steps(self, with_allocation: bool) -> int | None:
        """How many samples are run if one pass is enough."""
        if self.total is None:
            return None
        return self.total + self._lead_in_length() + (self._allocation_length() if with_allocation else 0)

    def read_dense(self, bar: ProgressBar) -> Mapping[str, ActivationStatistics]:
        """What the dense model shows to an allocation, by group key."""
        self._start()
        self._read(iter(self._samples), self._allocation_length(), bar)
        return self._statistics

    def lead_in(self, bar: ProgressBar) -> None:
        """Brings criteria near to what they will be."""
        samples, seen, size = iter(self._samples), 0, 1
        while seen < self._lead_in_length():
            self._start()
            read = self._read(samples, size, bar)
            if seen == 0 and not self._reached():
                raise SCAPError(never_reached(self.groups, self.groups))
            if read < size:
                break
            self._solve()
            self._update_modes()
            seen += read
            size = seen

    def read_all(self, bar: ProgressBar, keep_modes: bool) -> tuple[Group, float, bool]:
        """Reads all samples; the group with the largest drift, the drift, and whether a mode has to move."""
        self._start()
        spans: list[tuple[dict[str, Criterion], dict[str, int]]] = []
        seen = dict.fromkeys(self.criteria, 0)
        samples, total, size = iter(self._samples), 0, self._lead_in_length()
        while True:
            read = self._read(samples, size, bar)
            counts = {key: statistics.count for key, statistics in self._statistics.items()}
            spans.append((self.criteria, {key: counts[key] - seen[key] for key in counts}))
            seen, total = counts, total + read
            if read < size or total == self.total:
                break
            self._solve()
            size = total  # the number of samples doubles
        unseen = [group for group in self.groups if group.key not in self._reached()]
        if unseen:
            raise SCAPError(never_reached(unseen, self.groups))
        self._solve(final=True)
        drifts = [self._drift(group.key, spans) for group in self.groups]
        worst = int(np.argmax(drifts))
        moved = not keep_modes and self._update_modes()
        return self.groups[worst], drifts[worst], moved

    def _lead_in_length(self) -> int:
        if self.total is None:
            return LONGEST_LEAD_IN
        return max(1, min(LONGEST_LEAD_IN, int(self.total * LEAD_IN_FRACTION)))

    def _allocation_length(self) -> int:
        if self.total is None:
            return LONGEST_ALLOCATION
        return max(1, math.ceil(self.total * ALLOCATION_FRACTION))

    def _start(self) -> None:
        """Begins statistics anew."""
        self._statistics = {
            group.key: self._backend.statistics(
                names_of(group.layers), self._seed, self._scales.get(group.key), self._modes[group.key]
            )
            for group in self.groups
        }
        self._pooled = {pool: self._backend.statistics(pool, self._seed) for pool in self._pools.values()}

    def _read(self, samples: Iterator[Any], count: int, bar: ProgressBar) -> int:
        """Feeds the statistics with the next `count` samples; how many there were."""
        self._collector.set(self.criteria)
        read = 0
        for sample in islice(samples, count):
            self._collector.run(sample, self._visit)
            bar.advance()
            read += 1
        self._empty = self._empty and read == 0
        if self._empty:
            raise SCAPError("the calibration dataset is empty")
        return read

    def _visit(self, key: str, activations: Any) -> None:
        self._statistics[key].add(activations)
        if key in self._pools:
            self._pooled[self._pools[key]].add(activations)

    def _reached(self) -> set[str]:
        return {key for key in self._statistics if self._telling(key).count > 0}

    def _telling(self, key: str) -> ActivationStatistics:
        """The statistics that tell the criterion of a group: its own, or the pool's where these are too few."""
        own = self._statistics[key]
        return self._pooled[self._pools[key]] if key in self._pools and own.count < self._enough[key] else own

    def _solve(self, final: bool = False) -> None:
        """Takes over the criteria that fit what was seen; of groups that were not reached they stay what they are.

        What is all zero so far may become something else, unless this is `final`.
        """
        reached = {key for key in self._reached() if final or not self._telling(key).all_zero}
        self.criteria = self.criteria | {
            group.key: self._telling(group.key).solve(group.target.estimator, group.target.sparsity)
            for group in self.groups
            if group.key in reached
        }

    def _update_modes(self) -> bool:
        """Takes over the modes that groups with a scale have now; whether one of them moved.

        With a scale a threshold belongs to the mode that was given: that of the piece before.
        """
        moved = False
        for group in self.groups:
            if group.key in self._scales and group.key in self._reached():
                mode = self._telling(group.key).mode(group.target.estimator, group.target.sparsity)
                moved = moved or mode != self._modes[group.key]
                self._modes[group.key] = mode
        return moved

    def _drift(self, key: str, spans: Sequence[tuple[Mapping[str, Criterion], Mapping[str, int]]]) -> float:
        """How far the sparsity in force was from the final one on average, of what the pass saw."""
        statistics = self._statistics[key]
        if statistics.count == 0:  # its pool tells
            return 0.0
        final = statistics.sparsity(self.criteria[key])
        sums = sum(
            counts[key] * abs(statistics.sparsity(criteria[key]) - final) for criteria, counts in spans if counts[key]
        )
        return sums / statistics.count
