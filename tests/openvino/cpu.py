"""What this machine is."""

import os
import platform
from pathlib import Path

import openvino as ov


# Up to where oneDNN, which adds up in OpenVINO, may use what the CPU has.
ISA_VARIABLE = "ONEDNN_MAX_CPU_ISA"
# Without AMX; the name is known to be obeyed, unlike those of newer sets.
WITHOUT_AMX = "AVX512_CORE_BF16"
# What to do where the bits differ.
ORDER_OF_SUMS = (
    f"OpenVINO {ov.__version__} adds up in another order than exact.hpp, whose order was found on 2026.4 by comparing "
    "bits. Find the new one the same way: sums of few channels first, of one row and of several, then where sums "
    "begin anew (block_channels, scaled_together)"
)


def has_amx() -> bool:
    """Whether OpenVINO may use AMX in this process."""
    return "amx_tile" in _cpu_flags() and not os.environ.get(ISA_VARIABLE, "").startswith("AVX")


def knows_the_order_of_sums() -> bool:
    """Whether this is a CPU for which exact.hpp claims OpenVINO's order of sums in f32, of any version."""
    return platform.machine() == "x86_64" and "avx512_vnni" in _cpu_flags() and not has_amx()


def _cpu_flags() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text().split() if cpuinfo.exists() else []
