"""Two folders change places in one step."""

import ctypes
import errno
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # Linux renameat2(2)
_RENAME_SWAP = 2  # macOS renamex_np(2)


def exchange(one: Path, other: Path) -> bool:
    """Has two existing paths of one file system change places; False where system or file system cannot.

    Raises:
        OSError: if it can, but not with these.
    """
    call = _system_call()
    if call is None:
        return False
    if call(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@cache
def _system_call() -> Any:
    if not sys.platform.startswith(("linux", "darwin")):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        swap = getattr(library, "renamex_np", None)
        return swap and (lambda one, other: swap(one, other, ctypes.c_uint(_RENAME_SWAP)))
    rename = getattr(library, "renameat2", None)
    return rename and (lambda one, other: rename(_AT_FDCWD, one, _AT_FDCWD, other, ctypes.c_uint(_RENAME_EXCHANGE)))
