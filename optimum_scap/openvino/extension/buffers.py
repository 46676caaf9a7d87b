# SPDX-License-Identifier: Apache-2.0
"""The buffer of a layer's weights, written by the compiled extension.

Where its parts lie is described in ``cpp/weights.hpp`` alone: the library is asked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from .build import load_library


@dataclass(frozen=True)
class BufferContents:
    """What goes into the buffer of a layer.

    Attributes:
        weight_type: ``f32``, ``f16``, ``bf16``, ``u8`` or ``u4``.
        in_features, out_features, group_size: as of ``PackedLayer``.
        values: ``[out, in / per_byte]`` of the weights' own size, those of 4 bits in bytes.
        per_byte: 2 where a byte holds two values, the low nibble first.
        signed: whether the values are two's complement.
        scales: ``[out, groups]``, float16 or float32, of quantized weights.
        zero_points: ``[out, groups]``, uint8, where they are not all the same.
        bias: ``[out]``, float32.
    """

    weight_type: str
    in_features: int
    out_features: int
    values: np.ndarray
    per_byte: int = 1
    signed: bool = False
    group_size: int = 0
    scales: np.ndarray | None = None
    zero_points: np.ndarray | None = None
    bias: np.ndarray | None = None


class _Layout(ctypes.Structure):
    """``optimum_scap_layout`` of ``cpp/pack.cpp``."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("padded_out", "row_bytes", "scales", "zero_points", "bias", "bytes")
    ]


def fill_buffer(
    contents: BufferContents, library: Path, take: Callable[[int], np.ndarray] | None = None
) -> np.ndarray:
    """The buffer, in memory that ``take`` gives (by default its own), written by ``library`` on all threads.

    Raises:
        ExtensionBuildError: the library cannot be loaded.
    """
    functions = library_functions(library)
    layout = _layout(functions, contents)
    buffer = take(layout.bytes) if take else np.empty(layout.bytes, np.uint8)
    is_transposed = contents.per_byte == 1 and contents.values.T.flags.c_contiguous
    values = np.require(contents.values.T if is_transposed else contents.values, requirements=("C", "A"))
    written = functions.optimum_scap_pack_rows(
        contents.weight_type.encode(),
        values.ctypes.data,
        contents.out_features,
        contents.in_features,
        contents.per_byte,
        contents.signed,
        is_transposed,
        buffer.ctypes.data,
    )
    assert written, contents.weight_type
    parameters = [
        (layout.scales, _input_major(contents.scales, layout.padded_out)),
        (layout.zero_points, _input_major(contents.zero_points, layout.padded_out)),
        (layout.bias, contents.bias),
    ]
    end = contents.in_features * layout.row_bytes
    for begin, part in parameters:
        if part is not None:
            buffer[end:begin] = 0
            end = begin + part.nbytes
            buffer[begin:end] = part.reshape(-1).view(np.uint8)
    buffer[end:] = 0
    return buffer


def _layout(functions: ctypes.CDLL, contents: BufferContents) -> _Layout:
    layout = _Layout()
    is_known = functions.optimum_scap_buffer_layout(
        contents.weight_type.encode(),
        b"f16" if contents.scales is not None and contents.scales.dtype == np.float16 else b"f32",
        contents.in_features,
        contents.out_features,
        contents.group_size,
        contents.zero_points is not None,
        contents.bias is not None,
        ctypes.byref(layout),
    )
    assert is_known, contents.weight_type
    return layout


def _input_major(values: np.ndarray | None, padded_out: int) -> np.ndarray | None:
    """``[out, n]`` to ``[n, padded out]``, padding with zeros."""
    if values is None:
        return None
    out_features, n = values.shape
    result = np.zeros((n, padded_out), values.dtype)
    result[:, :out_features] = values.T
    return result


@lru_cache
def library_functions(library: Path) -> ctypes.CDLL:
    """The functions of ``cpp/pack.cpp``.

    Raises:
        ExtensionBuildError: the library cannot be loaded.
    """
    functions = load_library(library)
    size, flag = ctypes.c_int64, ctypes.c_int
    functions.optimum_scap_buffer_layout.argtypes = [
        ctypes.c_char_p, ctypes.c_char_p, size, size, size, flag, flag, ctypes.POINTER(_Layout)
    ]  # fmt: skip
    functions.optimum_scap_pack_rows.argtypes = [
        ctypes.c_char_p, ctypes.c_void_p, size, size, size, flag, flag, ctypes.c_void_p
    ]  # fmt: skip
    return functions
