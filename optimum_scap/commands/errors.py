"""One line on stderr and an exit code instead of a traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import SCAPError


@contextmanager
def errors_for_humans(command: str) -> Iterator[None]:
    """Ends the process with exit code 1 and one line on stderr if the block raises.

    With OPTIMUM_SCAP_TRACEBACK=1 in the environment the traceback is shown instead.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"{command}: interrupted, nothing was written", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get("OPTIMUM_SCAP_TRACEBACK") == "1":
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, SCAPError):
            message += f" ({type(error).__name__}; OPTIMUM_SCAP_TRACEBACK=1 shows where)"
        print(f"{command}: error: {message}", file=sys.stderr)
        sys.exit(1)
