# SPDX-License-Identifier: Apache-2.0
"""Converts the weights of fully connected layers to the buffer that the C++ operations read.

A layer is one flat uint8 array (OpenVINO's CPU plugin converts constants of f16, u4, i4 and i16, but leaves u8 alone):
rows of input channels, scales and zero points per group and float32 bias, those that exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .buffers import BufferContents, fill_buffer, library_functions
from .build import build_extension


CACHE_LINE_BYTES = 64
HUGE_PAGE_BYTES = 2 << 20
POOL_BYTES = 64 << 20


@dataclass(frozen=True)
class PackedLayer:
    """One fully connected layer as the operations' inputs and attributes.

    Attributes:
        weight_type: ``f32``, ``f16``, ``bf16``, ``u8`` or ``u4``.
        in_features, out_features: shape of the layer.
        buffer: everything the kernels read, uint8.
        scale_type: ``f32`` or ``f16``.
        group_size: input channels that share a scale; 0 is all of them.
        zero_point: the common zero point, 0 to 255, or -1 where the buffer holds one per group and output channel.
        has_bias: whether the buffer holds a bias.
    """

    weight_type: str
    in_features: int
    out_features: int
    buffer: np.ndarray
    scale_type: str = "f32"
    group_size: int = 0
    zero_point: int = 0
    has_bias: bool = False


class BufferPool:
    """Memory for the buffers of a model's layers, one behind the other.

    Where the system gives memory in huge pages to those who ask (numpy does), buffers of their own would leave a part
    of every layer in small pages, at both of its ends: a few percent of the speed at which they are read.
    """

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        """``size`` bytes, uninitialized, from the beginning of a cache line on."""
        if size > self._free.size:
            # What is not touched takes no memory.
            memory = np.empty(max(size, POOL_BYTES) + HUGE_PAGE_BYTES, np.uint8)
            self._free = memory[-memory.ctypes.data % HUGE_PAGE_BYTES :]
        buffer, self._free = self._free[:size], self._free[-(-size // CACHE_LINE_BYTES) * CACHE_LINE_BYTES :]
        return buffer


def pack_float(
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    bfloat16: bool = False,
    library: Path | None = None,
    pool: BufferPool | None = None,
) -> PackedLayer:
    """Packs float weights.

    Args:
        weight: ``[out, in]``, float32 or float16; with ``bfloat16``, the bit patterns as uint16.
        bias: ``[out]`` or None; for a mode m other than zero the caller has folded ``m * W.sum(1)`` into it.
        library: a library of ``build_extension``; default builds (or finds) the native one.
        pool: where the buffer comes from; by default it is memory of its own.

    Raises:
        ExtensionBuildError: the extension cannot be built or loaded.
        ValueError: for another dtype or shape.
    """
    names = {np.dtype(np.uint16): "bf16"} if bfloat16 else {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16"}
    if weight.ndim != 2 or weight.size == 0 or weight.dtype not in names:
        raise ValueError(
            f"weight must be [out, in] of {' or '.join(map(str, names))}, got {weight.dtype} {weight.shape}"
        )
    out_features, in_features = weight.shape
    contents = BufferContents(names[weight.dtype], in_features, out_features, weight, bias=_bias(bias, out_features))
    return PackedLayer(
        weight_type=contents.weight_type,
        in_features=in_features,
        out_features=out_features,
        buffer=fill_buffer(contents, library or build_extension(), pool.take if pool else None),
        has_bias=bias is not None,
    )


def pack_integer(
    q: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    *,
    bits: int,
    signed: bool,
    group_size: int = 0,
    nibbles: bool = False,
    library: Path | None = None,
    pool: BufferPool | None = None,
) -> PackedLayer:
    """Packs integer weights, ``W = (q - zero_point) * scale``.

    Args:
        q: ``[out, in]`` integers of ``bits`` bits, one per element; or with ``nibbles`` ``[out, in / 2]`` bytes.
        scale: ``[out, groups]``, float16 or float32.
        zero_point: ``[out, groups]`` integers in q's range, or None for 0.
        bias: ``[out]`` or None; for a mode m other than zero the caller has folded ``m * W.sum(1)`` into it.
        bits: 8 or 4.
        signed: whether q and zero_point are two's complement (i8, i4) or not (u8, u4).
        group_size: input channels per group; the last group may be shorter. 0: one group.
        nibbles: whether ``q`` holds two 4-bit values to a byte, the low nibble first, as OpenVINO stores them.
        library: a library of ``build_extension``; default builds (or finds) the native one.
        pool: where the buffer comes from; by default it is memory of its own.

    Raises:
        ExtensionBuildError: the extension cannot be built or loaded.
        ValueError: for values out of range or shapes that do not fit together.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    if q.ndim != 2 or q.size == 0 or q.dtype.kind not in "iu":
        raise ValueError(f"q must be integers [out, in], got {q.dtype} {q.shape}")
    if nibbles and (bits != 4 or q.dtype != np.uint8):
        raise ValueError(f"nibbles are uint8 of 4-bit values, got {q.dtype} of {bits} bits")
    out_features, in_features = q.shape[0], q.shape[1] * (2 if nibbles else 1)
    if group_size < 0:
        raise ValueError(f"group_size must not be negative, got {group_size}")
    groups = -(-in_features // group_size) if group_size else 1
    if scale.shape != (out_features, groups) or scale.dtype not in (np.float16, np.float32):
        raise ValueError(f"scale must be float [{out_features}, {groups}], got {scale.dtype} {scale.shape}")
    if zero_point is not None and zero_point.shape != (out_features, groups):
        raise ValueError(f"zero_point must be [{out_features}, {groups}], got {zero_point.shape}")

    offset = 1 << (bits - 1) if signed else 0
    rows, per_byte = q, 2 if nibbles else 1
    if not nibbles and (bits == 4 or q.dtype != (np.int8 if signed else np.uint8)):
        rows, signed = _to_unsigned(q, offset, bits, "q"), False
    common, zero_points = offset, None
    if zero_point is not None:
        unsigned = _to_unsigned(zero_point, offset, bits, "zero_point")
        common = int(unsigned.flat[0])
        if (unsigned != common).any():
            common, zero_points = -1, unsigned
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    is_half = bool((half.astype(np.float32) == scale).all())
    group_size = group_size if groups > 1 else 0
    contents = BufferContents(
        weight_type=f"u{bits}",
        in_features=in_features,
        out_features=out_features,
        values=rows,
        per_byte=per_byte,
        signed=signed,
        group_size=group_size,
        scales=half if is_half else scale,
        zero_points=zero_points,
        bias=_bias(bias, out_features),
    )
    return PackedLayer(
        weight_type=contents.weight_type,
        in_features=in_features,
        out_features=out_features,
        buffer=fill_buffer(contents, library or build_extension(), pool.take if pool else None),
        scale_type="f16" if is_half else "f32",
        group_size=group_size,
        zero_point=common,
        has_bias=bias is not None,
    )


def unpack_nibbles(packed: np.ndarray, count: int) -> np.ndarray:
    """OpenVINO's u4/i4 bytes (low nibble first) as ``count`` uint8 values; i4 still in two's complement."""
    flat = packed.reshape(-1).view(np.uint8)
    values = np.empty((flat.size, 2), np.uint8)
    np.bitwise_and(flat, 15, out=values[:, 0])
    np.right_shift(flat, 4, out=values[:, 1])
    return values.reshape(-1)[:count]


def _to_unsigned(values: np.ndarray, offset: int, bits: int, name: str) -> np.ndarray:
    low, high = -offset, (1 << bits) - 1 - offset
    if values.dtype.kind not in "iu" or int(values.min()) < low or int(values.max()) > high:
        raise ValueError(f"{name} must be integers in [{low}, {high}]")
    # Modulo 256, adding the offset is the same for two's complement bytes of any width.
    return values.astype(np.uint8, copy=False) + np.uint8(offset)


def is_fast_for_dense_int4(library: Path) -> bool:
    """Whether dense layers of 4-bit weights decode faster with the extension than with OpenVINO's own kernels."""
    return bool(library_functions(library).optimum_scap_is_fast_for_dense_int4())


def _bias(bias: np.ndarray | None, out_features: int) -> np.ndarray | None:
    if bias is None:
        return None
    if bias.size != out_features:
        raise ValueError(f"bias must be [{out_features}], got {bias.shape}")
    return np.ascontiguousarray(bias, np.float32)
