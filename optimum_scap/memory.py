"""Memory of this process."""

import ctypes
from functools import cache
from typing import Any


def give_back_freed() -> None:
    """Gives memory that was freed back to the system, where the C library can: glibc keeps it for what comes next.

    Between tensors that stay, what large temporary ones leave cannot always be used again: without this, packing the
    weights of a model leaves the process with up to twice their size.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, Windows
        return None
