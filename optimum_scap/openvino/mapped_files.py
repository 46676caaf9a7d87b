"""Gives memory back that only holds what files hold: weights that OpenVINO mapped and that are not needed any more."""

import ctypes
import mmap
from bisect import bisect_right
from pathlib import Path

import numpy as np


_MADV_DONTNEED = 4


class MappedFiles:
    """The weight files (`.bin`) that this process has mapped read-only. Elsewhere than on Linux there are none."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        try:
            lines = Path("/proc/self/maps").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
            if permissions.startswith("r--") and path and path[0].endswith(".bin"):
                first, last = (int(address, 16) for address in addresses.split("-"))
                self._ranges.append((first, last))
        self._ranges.sort()

    def release(self, array: np.ndarray) -> bool:
        """Takes the whole pages of `array` out of memory, if a file is behind them, where the next reader finds them.

        Returns whether there was one.
        """
        first, last = array.ctypes.data, array.ctypes.data + array.nbytes
        index = bisect_right(self._ranges, (first, float("inf"))) - 1
        if index < 0 or not array.flags.c_contiguous or last > self._ranges[index][1]:
            return False
        first, last = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)
        return True
