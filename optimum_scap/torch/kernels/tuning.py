"""Finds launch configurations for given shapes by measuring, in bounded time, and keeps them in the user's cache."""

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..weights import IntegerWeights, find_format
from .configurations import (
    MIN_CHANNELS_PER_SLICE,
    LaunchConfiguration,
    device_key,
    rule_of_thumb,
    save,
    shape_key,
    slices_within_groups,
    sum_block_for,
)


logger = logging.getLogger(__name__)

SPARSITIES = (0.0, 0.5, 0.9)
RESIDENT_WARPS = (8, 12, 16, 24)
# Channels loaded together, and bytes of each per thread.
LOADS = ((8, 16), (16, 16))
INTEGER_LOADS = ((8, 8), (16, 4), (16, 8), (8, 16))
SLICE_FACTORS = (0.75, 0.84, 0.92, 1.09, 1.19, 1.33)
# Weights are read from memory, not from the L2 cache: so much is read before the same weights come again.
BYTES_BETWEEN_REUSE = 300_000_000
# Per graph. Tuning compares, and compiling takes longer: it can do with less than a measurement that is reported.
MILLISECONDS = 5


@dataclass(frozen=True)
class TunedShape:
    """What `tune` found for one shape: the configuration, and its time over that of the rule of thumb."""

    configuration: LaunchConfiguration
    relative_time: float
    tried: int


def tune(
    shapes: Sequence[tuple[int, tuple[int, ...]]],
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cuda",
    budget_seconds: float = 60.0,
    path: Path | None = None,
    format: str = "dense",
    group_size: int = 128,
) -> dict[str, TunedShape]:
    """Tunes one-token decoding for the shapes, and keeps the results for later processes.

    Args:
        shapes: (in_features, (out_features, ...)); several out_features for layers over
            one input (`gate` and `up`; `q`, `k` and `v`).
        dtype: of the weights; of activations and scales if the weights are integers.
        device: GPU to tune on.
        budget_seconds: time to spend, divided evenly among the shapes; each shape tries one configuration at least.
        path: file to add the results to; the user's cache by default.
        format: of the weights, a name of `torch.weights`.
        group_size: input channels that share a scale, of integer weights.

    Returns:
        {name of the shape in the file: TunedShape}
    """
    device = torch.device(device)
    deadline = time.monotonic()
    found = {}
    with torch.cuda.device(device):
        for in_features, out_features in shapes:
            deadline = max(deadline, time.monotonic()) + budget_seconds / len(shapes)
            problem = _Problem(in_features, out_features, dtype, device, format, group_size)
            key = shape_key(in_features, out_features, problem.bits, format, problem.group_size)
            found[key] = _tune_shape(problem, device, deadline)
            logger.info("%s: %s", key, found[key])
    save(device_key(device), {key: tuned.configuration for key, tuned in found.items()}, path)
    return found


def candidates(
    in_features: int,
    out_features: tuple[int, ...],
    weight_bits: int,
    multiprocessors: int,
    group_size: int | None = None,
) -> list[LaunchConfiguration]:
    """Configurations worth trying, the most promising first."""
    found = []
    for unroll, lane_bytes in LOADS if group_size is None else INTEGER_LOADS:
        for num_warps in (4, 2, 8, 1) if group_size is None else (2, 1, 4):
            for resident_warps in RESIDENT_WARPS:
                block_n = LaunchConfiguration(num_warps, unroll, 1, 64, lane_bytes).block_n(weight_bits)
                blocks = sum(-(-features // block_n) for features in out_features)
                slices = multiprocessors * resident_warps // num_warps // blocks
                slices = max(1, min(slices, in_features // (MIN_CHANNELS_PER_SLICE // 2)))
                if group_size is not None:
                    slices = slices_within_groups(slices, in_features, group_size)
                configuration = LaunchConfiguration(num_warps, unroll, slices, sum_block_for(slices), lane_bytes)
                if configuration not in found:
                    found.append(configuration)
    return found


def refinements(
    configuration: LaunchConfiguration, in_features: int, group_size: int | None = None
) -> list[LaunchConfiguration]:
    """Configurations close to a good one."""
    slices = {round(configuration.slices * factor) for factor in SLICE_FACTORS}
    slices = {number for number in slices if 1 <= number <= in_features}
    if group_size not in (None, in_features):  # slices that cut across groups are no better
        slices = set()
    found = [replace(configuration, slices=number) for number in sorted(slices)]
    found += [replace(near, sum_block=block) for near in (configuration, *found) for block in (32, 64, 128)]
    return [near for near in dict.fromkeys(found) if near != configuration]


def _tune_shape(problem: "_Problem", device: torch.device, deadline: float) -> TunedShape:
    shape = (problem.in_features, problem.out_features, problem.bits)
    first = rule_of_thumb(device_key(device), 1, *shape, problem.group_size)
    reference = [problem.time(first, sparsity) for sparsity in SPARSITIES]
    best = TunedShape(first, 1.0, 1)

    def try_all(configurations: Sequence[LaunchConfiguration]) -> None:
        nonlocal best
        for configuration in configurations:
            if time.monotonic() > deadline:
                return
            times = [problem.time(configuration, sparsity) for sparsity in SPARSITIES]
            relative = statistics.fmean(mine / theirs for mine, theirs in zip(times, reference, strict=True))
            better = relative < best.relative_time
            best = TunedShape(
                configuration if better else best.configuration, min(relative, best.relative_time), best.tried + 1
            )

    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    try_all(candidates(*shape, multiprocessors, problem.group_size))
    try_all(refinements(best.configuration, problem.in_features, problem.group_size))
    return best


class _Problem:
    """Random weights and inputs of one shape, as many as it takes to read weights from memory."""

    def __init__(
        self,
        in_features: int,
        out_features: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        format: str = "dense",
        group_size: int = 128,
    ) -> None:
        self.in_features, self.out_features, self.format = in_features, out_features, format
        self.bits = {"int4": 4, "int8": 8}.get(format, 8 * dtype.itemsize)
        self.group_size = None if format == "dense" else group_size
        self.bytes = in_features * sum(out_features) * self.bits // 8
        self.copies = min(max(4, int(BYTES_BETWEEN_REUSE / (self.bytes * (1 - max(SPARSITIES))))), 200)
        self.weights = [
            [tensor for features in out_features for tensor in self._random(features, dtype, device)]
            for _ in range(self.copies)
        ]
        self.inputs = torch.randn(self.copies, 1, in_features, dtype=dtype, device=device)

    def _random(self, features: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        if self.group_size is None:
            return (torch.randn(self.in_features, features, dtype=dtype, device=device).t(),)
        limit = 1 << self.bits - 1
        shape = (features, self.in_features)
        integers = torch.randint(-limit, limit, shape, dtype=torch.int8, device=device)
        scales = torch.rand(features, self.in_features // self.group_size, dtype=dtype, device=device)
        return find_format(self.format).pack(IntegerWeights(self.bits, integers, scales)).tensors

    def time(self, configuration: LaunchConfiguration, sparsity: float) -> float:
        threshold = normal_threshold(sparsity)
        copies = min(self.copies, max(4, int(BYTES_BETWEEN_REUSE / (self.bytes * (1 - sparsity)))))
        launches = [self._launch(number, threshold, configuration) for number in range(copies)]
        return graph_time(launches, MILLISECONDS)

    def _launch(self, number: int, threshold: float, configuration: LaunchConfiguration) -> Callable[[], Any]:
        from .launch import sparse_linear_group

        x, weights, count = self.inputs[number], self.weights[number], len(self.out_features)
        return lambda: sparse_linear_group(
            x, weights, self.format, count * [None], count * [threshold], count * [0.0], count * [None], configuration
        )


def normal_threshold(sparsity: float) -> float:
    """The threshold that prunes this fraction of standard normal values; below zero, nothing is pruned."""
    if sparsity == 0:
        return -1.0
    threshold = statistics.NormalDist().inv_cdf((1 + sparsity) / 2)
    return torch.tensor(threshold, dtype=torch.float32).item()


def graph_time(launches: Sequence[Callable[[], Any]], milliseconds: int = 20) -> float:
    """Median time of one launch, in microseconds, when all of them are replayed in order as one CUDA graph.

    The graph repeats them for about so many milliseconds of launching from Python: its start does not count.
    """
    from triton.testing import do_bench_cudagraph

    time_of_all = do_bench_cudagraph(lambda: [launch() for launch in launches], rep=milliseconds, return_mode="median")
    return 1000 * time_of_all / len(launches)
