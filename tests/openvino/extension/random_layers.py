# SPDX-License-Identifier: Apache-2.0
"""Random layers of every weight kind, packed and as float64, and models that hold one operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from reference.scap import dequantize

from optimum_scap.openvino.extension.build import ExtensionBuildError, build_extension
from optimum_scap.openvino.extension.packing import PackedLayer, pack_float, pack_integer


# kind: (bits, signed, has zero points)
INTEGER_KINDS = {
    "i8": (8, True, False),
    "u8_asym": (8, False, True),
    "i8_asym": (8, True, True),
    "i4": (4, True, False),
    "u4_asym": (4, False, True),
    "i4_asym": (4, True, True),
}
KINDS = ("f32", "f16", "bf16", *INTEGER_KINDS)


# What the CPU must have to run the builds for an instruction set, as /proc/cpuinfo names it.
NEEDED_FLAGS = {
    "amx": "amx_int8",
    "avx512vnni": "avx512_vnni",
    "avx512": "avx512bw",
    "avx2vnni": "avx_vnni",
    "avx2": "avx2",
}


def library_for(isa: str) -> Path:
    """The extension built for an instruction set; skips the test where it cannot be built or run."""
    try:
        library = build_extension(isa)
    except ExtensionBuildError as error:
        pytest.skip(str(error))
    if isa in NEEDED_FLAGS and NEEDED_FLAGS[isa] not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this CPU has no {isa}")
    return library


@dataclass(frozen=True)
class RandomLayer:
    weight: np.ndarray  # [out, in], float64
    bias: np.ndarray | None
    packed: PackedLayer


def random_layer(kind: str, in_features: int, out_features: int, group_size: int = 0, seed: int = 0) -> RandomLayer:
    rng = np.random.default_rng(seed)
    bias = rng.standard_normal(out_features).astype(np.float32) if seed % 2 == 0 else None
    if kind not in INTEGER_KINDS:
        weight = rng.standard_normal((out_features, in_features)).astype(np.float32)
        if kind == "bf16":
            bits = (weight.view(np.uint32) >> 16).astype(np.uint16)
            exact = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
            return RandomLayer(exact, bias, pack_float(bits, bias, bfloat16=True))
        weight = weight.astype(np.float16) if kind == "f16" else weight
        return RandomLayer(weight.astype(np.float64), bias, pack_float(weight, bias))
    bits, signed, asymmetric = INTEGER_KINDS[kind]
    low = -(1 << (bits - 1)) if signed else 0
    dtype = np.int8 if signed else np.uint8
    groups = -(-in_features // group_size) if group_size else 1
    q = rng.integers(low, low + (1 << bits), (out_features, in_features)).astype(dtype)
    scale = (rng.random((out_features, groups)) * 0.1 + 0.01).astype(np.float16 if seed % 3 else np.float32)
    zero = rng.integers(low, low + (1 << bits), (out_features, groups)).astype(dtype) if asymmetric else None
    packed = pack_integer(q, scale, zero, bias, bits=bits, signed=signed, group_size=group_size)
    return RandomLayer(dequantize(q, scale, zero, group_size), bias, packed)


def activations(shape: Sequence[int], seed: int = 0, outliers: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    if outliers:
        x[..., rng.integers(shape[-1])] *= 1000
    return x


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-6))


@lru_cache
def core() -> ov.Core:
    return ov.Core()


def parameter(in_features: int, rank: int = 3) -> ov.Node:
    return ops.parameter([-1] * (rank - 1) + [in_features], np.float32)


def compile_node(node: ov.Node, x: ov.Node, **config: str) -> ov.CompiledModel:
    config = {"INFERENCE_PRECISION_HINT": "f32"} | config
    return core().compile_model(ov.Model(list(node.outputs()), [x]), "CPU", config)
