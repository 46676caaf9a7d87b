"""Space on the disk that is written to: asked for before work begins, and named when it was too little."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from .errors import SCAPError, errors_behind


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# What libraries make of it that keep no number: Rust's (safetensors, tokenizers), shutil's lists of files, linkers.
_SAYS_DISK_FULL = (
    "no space left on device",
    "disk quota exceeded",
    *(f"(os error {number})" for number in _DISK_FULL),
)
# C++ streams (OpenVINO's) do not tell why they failed: it is this if hardly anything is free.
_HARDLY_ANYTHING = 1 << 20


class DiskFullError(SCAPError):
    """No space is left where something is written, or less than the `needed` bytes."""

    def __init__(self, folder: Path, needed: int | None = None) -> None:
        more = "" if needed is None else f", {_mib(needed)} needed"
        super().__init__(f"no space left on {folder} ({_mib(free_bytes(folder))} free{more})")
        self.needed = needed


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether `error`, which came while `folder` was written to, or one behind it says that no space was left."""
    if isinstance(error, DiskFullError):
        return True
    return any(
        isinstance(cause, OSError)
        and cause.errno in _DISK_FULL
        or any(words in str(cause).lower() for words in _SAYS_DISK_FULL)
        or "iostream error" in str(cause)
        and _has_less_than(folder, _HARDLY_ANYTHING)
        for cause in errors_behind(error)
    )


def check_space(folder: Path, needed: int) -> None:
    """Checks that `folder` can be written to and that `needed` bytes fit on its disk.

    Raises:
        SCAPError: if not, a DiskFullError if it is the space.
    """
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise SCAPError(f"output folder {folder} does not exist or cannot be written to")
    if _has_less_than(folder, needed):
        raise DiskFullError(folder, needed)


def free_bytes(folder: Path) -> int:
    """Bytes that are free where `folder`, which need not exist yet, is."""
    return _usage(folder).free


def _has_less_than(folder: Path, size: int) -> bool:
    """Whether less than `size` bytes are free; some file systems do not tell, and say that they have none at all."""
    usage = _usage(folder)
    return usage.total > 0 and usage.free < size


def _usage(folder: Path) -> Any:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
