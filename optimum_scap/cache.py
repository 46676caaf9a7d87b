"""Where this machine keeps what is made on it: the compiled extension and tuned launch configurations."""

import os
import sys
from pathlib import Path

from .errors import SCAPError


def cache_folder() -> Path:
    """`$OPTIMUM_SCAP_CACHE`, or `optimum_scap` in the platform's user cache; always absolute.

    A relative `OPTIMUM_SCAP_CACHE` counts from the current folder, and `~` is the user's home. A relative
    `XDG_CACHE_HOME` is ignored, as the XDG Base Directory Specification demands.

    Raises:
        SCAPError: the user has no home folder, or the current folder is gone.
    """
    try:
        if override := os.environ.get("OPTIMUM_SCAP_CACHE"):
            return Path(os.path.abspath(Path(override).expanduser()))
        return _user_cache() / "optimum_scap"
    except (RuntimeError, OSError) as error:  # containers run as users that no file lists
        reason = str(error).rstrip(".")
        raise SCAPError(f"no folder for the cache ({reason}): set OPTIMUM_SCAP_CACHE to an absolute path") from error


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return named if named.is_absolute() else Path.home() / ".cache"
