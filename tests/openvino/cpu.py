"""What this machine is."""

import platform
from pathlib import Path

import openvino as ov


def knows_the_order_of_sums() -> bool:
    """Whether this is where the order in which OpenVINO adds up in f32 is known, see extension/exact.hpp."""
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        return False
    flags = Path("/proc/cpuinfo").read_text().split()
    return "avx512_vnni" in flags and "amx_tile" not in flags and ov.__version__.startswith("2026.4.")
