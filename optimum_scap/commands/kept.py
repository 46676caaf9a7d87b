"""What calibration found outlives a command that fails behind it."""

import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..core.config import SCAPConfig
from ..core.parameter_files import save_parameters
from ..core.parameters import SCAPParameters
from ..errors import SCAPError
from .signals import note_of


@contextmanager
def parameters_kept(args: Namespace, what: SCAPConfig | SCAPParameters) -> Iterator[Callable[[SCAPParameters], None]]:
    """Hands out what is to be called with the parameters; if the block fails after that, they are written to a file.

    Args:
        args: the command's arguments, of which `output` says where: `OUT.scap-parameters.json`, or in the folder for
            temporary files if nothing can be written there.
        what: what is applied. Parameters that come from a file are not written again.
    """
    found: list[SCAPParameters] = []
    output = Path(args.output)  # which is another while the command runs
    try:
        yield found.append
    except BaseException as error:
        if found and isinstance(what, SCAPConfig) and not note_of(error):  # a note says that the output was written
            _write(found[-1], output)
        raise


def _write(parameters: SCAPParameters, output: Path) -> None:
    beside = output.resolve().with_name(f"{output.resolve().name}.scap-parameters.json")
    for file in (beside, Path(tempfile.gettempdir()) / beside.name):
        with suppress(SCAPError, OSError):
            save_parameters(parameters, unused := _unused(file))
            print(f"The calibrated parameters are in {unused}; --scap-parameters applies them", file=sys.stderr)
            return
    print("The calibrated parameters could not be written to any file", file=sys.stderr)


def _unused(file: Path) -> Path:
    """`file`, or its name with a number where there is one already."""
    number, unused = 1, file
    while unused.exists() or unused.is_symlink():
        number += 1
        unused = file.with_name(f"{file.name.removesuffix('.json')}-{number}.json")
    return unused
