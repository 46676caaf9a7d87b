"""One line on stderr and an exit code instead of a traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import SCAPError, interruption_behind
from .signals import Terminated, note_of


@contextmanager
def errors_for_humans(command: str) -> Iterator[None]:
    """Ends the process with one line on stderr if the block raises: exit code 1, or 128 + N behind signal N.

    With OPTIMUM_SCAP_TRACEBACK=1 in the environment the traceback is shown instead.
    """
    try:
        with _safe_path():
            yield
    except (KeyboardInterrupt, Terminated) as stop:
        _stop(command, stop)
    except Exception as error:
        interruption = interruption_behind(error)
        if interruption is not None:
            _stop(command, interruption)
        if os.environ.get("OPTIMUM_SCAP_TRACEBACK") == "1":
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, SCAPError):
            message += f" ({type(error).__name__}; OPTIMUM_SCAP_TRACEBACK=1 shows where)"
        print(f"{command}: error: {message}", file=sys.stderr)
        sys.exit(1)


@contextmanager
def _safe_path() -> Iterator[None]:
    """Python processes that the block starts do not look for modules in the current folder, which may be a model's.

    Python 3.11 and later know the variable.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def _stop(command: str, stop: BaseException) -> None:
    what, code = ("terminated", stop.code) if isinstance(stop, SystemExit) else ("interrupted", 130)
    print(f"{command}: {what}, {note_of(stop) or 'nothing was written'}", file=sys.stderr)
    sys.exit(code)
