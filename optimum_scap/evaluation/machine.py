"""What a measurement was taken on: every result names it."""

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


PACKAGES = ("optimum-scap", "openvino", "nncf", "optimum-intel", "transformers", "torch", "triton")


def describe_machine(*, gpu: bool = False) -> dict[str, str]:
    """CPU, the cores that this process may use, date, and the versions of the packages that matter.

    Args:
        gpu: whether what is measured runs on torch's current GPU, which is then named too, with its runtime's version.
    """
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_name(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        **(_describe_gpu() if gpu else {}),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        **versions,
    }


def _describe_gpu() -> dict[str, str]:
    import torch

    runtime = {"cuda": torch.version.cuda, "rocm": torch.version.hip}
    return {
        "gpu": torch.cuda.get_device_name(),
        **{name: number for name, number in runtime.items() if number is not None},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
