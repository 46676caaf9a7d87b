"""Launches of the Triton kernels, planned once: at decode the GPU waits for the host, whose every microsecond counts.

A plan holds all that follows from shapes and types, and the compiled kernel. Triton itself works out both at every
call, which takes 20 to 30 us.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .branches import Branch
from .configurations import DenseConfiguration, LaunchConfiguration, supports_early_launch
from .fixed_point import MAX_CHANNELS
from .linear import (
    add_gated_partial_sums_kernel,
    add_partial_sums_kernel,
    dense_kernel,
    dequantize_kernel,
    partial_sums_kernel,
)
from .load import FORMAT_FUNCTIONS
from .memory import hold_instructions


MAX_STEPS = 16
SUM_WARPS = 4
DEQUANTIZED_WORDS = 32
DEQUANTIZED_CHANNELS = 32


class Launch:
    """A kernel with its grid and constants, for arguments of the same shapes and types.

    Args:
        kernel: made by triton.jit; what its signature marks as constexpr comes last.
        grid: of programs.
        constants: by name.
        options: of the compiler.
    """

    def __init__(self, kernel: Any, grid: Sequence[int], constants: Mapping[str, Any], **options: Any) -> None:
        self._kernel = kernel
        self._grid = (*grid, 1, 1)[:3]
        names = kernel.arg_names[len(kernel.arg_names) - len(constants) :]
        self._constants = tuple(constants[name] for name in names)
        self._options = options
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, tensors: Sequence[Tensor | None], *arguments: Any) -> None:
        """Launches the kernel on the current device.

        Args:
            tensors: those of the arguments whose address or type a plan does not know: Triton compiles for the type,
                and for addresses that are multiples of 16 bytes.
            arguments: of the kernel, but for the constants.
        """
        key = tuple([None if value is None else (value.dtype, value.data_ptr() % 16 == 0) for value in tensors])
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[self._grid](*arguments, *self._constants)
            return
        compiled = self._kernel[self._grid](*arguments, *self._constants, **self._options)
        if hasattr(compiled, "__getitem__"):  # Triton's interpreter compiles nothing
            self._compiled[key] = compiled


class Stored(NamedTuple):
    """How the weights of a launch lie in memory, but for their addresses."""

    out_features: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    scaled: tuple[bool, ...]
    kind: tuple[Any, ...]
    columns_per_word: int
    words_per_tile: int
    word_bytes: int
    row_words: int

    @classmethod
    def of(cls, branches: Sequence[Branch]) -> "Stored":
        """Of these layers."""
        first = branches[0].weights
        return cls(
            tuple([branch.out_features for branch in branches]),
            tuple([branch.weights.strides for branch in branches]),
            tuple([branch.scale is not None for branch in branches]),
            first.kind,
            first.columns_per_word,
            first.words_per_tile,
            first.tensors[0].element_size(),
            first.tensors[0].stride(0),
        )

    @property
    def constants(self) -> tuple[Any, ...]:
        return self.kind[0]

    @property
    def group_size(self) -> int | None:
        return self.kind[1]


class SparsePlan(NamedTuple):
    """Of `partial_sums_kernel`.

    Args:
        launch: it.
        lists, list_dtype, list_size: scratch memory for the kept channels: elements, their type, those of a program.
        group_ends, groups: where they change groups: elements, 0 for none, and those of a program.
        slices: parts of the channels.
        columns: of all branches.
    """

    launch: Launch
    lists: int
    list_dtype: torch.dtype
    list_size: int
    group_ends: int
    groups: int
    slices: int
    columns: int


@cache
def plan_sparse(
    device: torch.device,
    rows: int,
    in_features: int,
    dtype: torch.dtype,
    format: str,
    stored: Stored,
    configuration: LaunchConfiguration,
) -> SparsePlan:
    """For an input `[rows, in_features]`."""
    group_size = stored.group_size
    block_n = configuration.block_n(8 * stored.word_bytes // stored.columns_per_word)
    blocks = sum(triton.cdiv(features, block_n) for features in stored.out_features)
    slices = min(configuration.slices, in_features)
    slice_size = triton.cdiv(in_features, slices)
    list_size = triton.cdiv(slice_size + 2 * configuration.unroll, 16) * 16
    programs = slices * blocks
    fixed_point = (
        rows == 1
        and group_size is not None
        and torch.version.hip is None  # which has no instruction for it
        and configuration.unroll % 4 == 0
        and slice_size * stored.row_words < 1 << 31
        and slice_size <= MAX_CHANNELS
    )
    list_dtype = torch.int16 if slice_size <= torch.iinfo(torch.int16).max else torch.int32
    groups = 0
    if not _slices_lie_in_groups(in_features, slices, group_size):
        assert group_size is not None
        groups = (slice_size - 1) // group_size + 2
    lanes = 32 * configuration.num_warps
    nvidia = device.type == "cuda" and torch.version.hip is None
    functions = FORMAT_FUNCTIONS[format]
    early = supports_early_launch(device)
    constants = {
        "ROWS": rows,
        "LANES": lanes,
        "STEPS": min(MAX_STEPS, triton.next_power_of_2(triton.cdiv(slice_size, lanes))),
        "BLOCK_N": block_n,
        "UNROLL": configuration.unroll,
        "WHOLE_BLOCKS": all(features % block_n == 0 for features in stored.out_features),
        "FIXED_POINT": fixed_point,
        "SLICE_SIZE": slice_size if fixed_point else None,
        "HAS_SCALE": stored.scaled if any(stored.scaled) else None,
        "HOLD": hold_instructions(configuration.unroll, stored.word_bytes, configuration.lane_bytes)
        if nvidia
        else None,
        "READ": functions.read,
        "UNPACK": functions.unpack,
        "LOAD_SCALES": functions.load_scales,
        "APPLY_SCALES": functions.apply_scales,
        "CONSTANTS": (*stored.constants, dtype == torch.float32),
        "PARTS": stored.columns_per_word,
        "WORDS_PER_TILE": stored.words_per_tile,
        "GROUP_SIZE": group_size or in_features,
        "LAUNCH_EARLY": early,
    }
    launch = Launch(
        partial_sums_kernel, (blocks, slices), constants, num_warps=configuration.num_warps, **launch_options(early)
    )
    return SparsePlan(
        launch,
        programs * list_size,
        torch.int64 if fixed_point else list_dtype,
        list_size,
        programs * groups,
        groups,
        slices,
        sum(stored.out_features),
    )


def _slices_lie_in_groups(in_features: int, slices: int, group_size: int | None) -> bool:
    """Whether no slice holds channels of two groups."""
    if group_size is None or group_size == in_features:
        return True
    return in_features % slices == 0 and group_size % (in_features // slices) == 0


@cache
def plan_sums(
    device: torch.device, slices: int, rows: int, out_features: tuple[int, ...], sum_block: int, dtype: torch.dtype
) -> Launch:
    """Of `add_partial_sums_kernel`, for outputs of this type."""
    early = supports_early_launch(device)
    return Launch(
        add_partial_sums_kernel,
        (sum(triton.cdiv(features, sum_block) for features in out_features), rows),
        {"SLICES_CEIL": triton.next_power_of_2(slices), "BLOCK_N": sum_block, "LAUNCH_EARLY": early},
        num_warps=SUM_WARPS,
        **launch_options(early),
    )


@cache
def plan_gated_sums(
    device: torch.device, slices: int, rows: int, features: int, sum_block: int, dtype: torch.dtype, activation: str
) -> Launch:
    """Of `add_gated_partial_sums_kernel`, for outputs of this type."""
    early = supports_early_launch(device)
    return Launch(
        add_gated_partial_sums_kernel,
        (triton.cdiv(features, sum_block), rows),
        {
            "ACTIVATION": activation,
            "SLICES_CEIL": triton.next_power_of_2(slices),
            "BLOCK_N": sum_block,
            "LAUNCH_EARLY": early,
        },
        num_warps=SUM_WARPS,
        **launch_options(early),
    )


@cache
def plan_dense(
    device: torch.device, in_features: int, dtype: torch.dtype, stored: Stored, configuration: DenseConfiguration
) -> Launch:
    """Of `dense_kernel`, for an input of this type."""
    early = supports_early_launch(device)
    return Launch(
        dense_kernel,
        (sum(triton.cdiv(features, configuration.block_n) for features in stored.out_features),),
        {"BLOCK_N": configuration.block_n, "BLOCK_K": configuration.block_k, "LAUNCH_EARLY": early},
        num_warps=configuration.num_warps,
        **launch_options(early),
    )


@cache
def plan_dequantization(
    device: torch.device, in_features: int, begin: int, end: int, dtype: torch.dtype, format: str, stored: Stored
) -> Launch:
    """Of `dequantize_kernel`, for the output channels from `begin` to `end`, in this type."""
    functions = FORMAT_FUNCTIONS[format]
    words = triton.cdiv(end - begin, stored.columns_per_word)
    return Launch(
        dequantize_kernel,
        (triton.cdiv(words, DEQUANTIZED_WORDS), triton.cdiv(in_features, DEQUANTIZED_CHANNELS)),
        {
            "BLOCK_K": DEQUANTIZED_CHANNELS,
            "BLOCK_WORDS": DEQUANTIZED_WORDS,
            "UNPACK": functions.unpack,
            "LOAD_SCALES": functions.load_scales,
            "APPLY_SCALES": functions.apply_scales,
            "CONSTANTS": (*stored.constants, True),
            "PARTS": stored.columns_per_word,
            "WORDS_PER_TILE": stored.words_per_tile,
            "GROUP_SIZE": stored.group_size,
        },
        num_warps=4,
    )


def launch_options(early: bool) -> dict[str, bool]:
    """Of a kernel that is launched while the one in front of it still runs, or not."""
    return {"launch_pdl": True} if early else {}
