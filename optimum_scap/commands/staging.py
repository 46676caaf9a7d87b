"""An output folder that appears complete or not at all."""

import glob
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import SCAPError, first_line


# Besides model files, what marks a folder as an earlier export that may be replaced.
_EXPORT_MARKS = ("openvino_*.xml", "*.xml", "config.json")


def check_output(output: Path) -> None:
    """Checks that `output` can become an exported folder: it is absent, empty, or holds an earlier export.

    Raises:
        SCAPError: otherwise.
    """
    if output.is_dir():
        content = list(output.iterdir())
        if content and not any(next(output.glob(mark), None) for mark in _EXPORT_MARKS):
            raise SCAPError(f"output folder {output} holds files that are no exported model; choose another folder")
        if output.resolve() == Path.cwd():
            raise SCAPError(f"output folder {output} is the current folder, which cannot be replaced; choose another")
    elif output.exists():
        raise SCAPError(f"output {output} exists and is not a folder")
    parent = _existing_parent(output)
    if not parent.is_dir():
        raise SCAPError(f"output {output} cannot be created: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise SCAPError(f"output {output} cannot be created: no permission to write in {parent}")


def check_output_is_not_model(output: Path, model: str | Path) -> None:
    """Checks that `output`, which is replaced as a whole, is neither the model folder nor around it.

    Raises:
        SCAPError: otherwise.
    """
    if not Path(model).exists():
        return
    source, target = Path(model).resolve(), output.resolve()
    if source == target:
        raise SCAPError(f"output folder {output} is the model folder itself; choose another")
    if target in source.parents:
        raise SCAPError(f"output folder {output} holds the model folder {model}; choose another")


@contextmanager
def staged_output(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block ends well and is removed when not.

    An earlier export in `output` is replaced whole; of a link, what it points to. Folders that killed processes left
    behind are removed.
    """
    check_output(output)
    output = output.resolve()
    prefix = f".{output.name}.scap-"
    for stale in output.parent.glob(f"{glob.escape(prefix)}*"):
        if not _is_alive(stale):
            shutil.rmtree(stale, ignore_errors=True)
    created: list[Path] = []
    try:
        _create_parents(output.parent, created)
        staging = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=output.parent))
    except OSError as error:
        _remove(created)
        raise SCAPError(f"output {output} cannot be created: {first_line(error)}") from error
    complete = staging / "complete"
    complete.mkdir()
    try:
        with _terminate_as_exception():
            yield complete
        _swap(complete, output, staging / "replaced")
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        _remove(created)
        raise
    shutil.rmtree(staging, ignore_errors=True)


def _swap(complete: Path, output: Path, replaced: Path) -> None:
    if output.exists():
        output.rename(replaced)
    try:
        complete.rename(output)
    except OSError:
        if replaced.exists():
            replaced.rename(output)
        raise


def _is_alive(staging: Path) -> bool:
    pid = staging.name.rpartition(".scap-")[2].partition("-")[0]
    if not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _existing_parent(path: Path) -> Path:
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _create_parents(folder: Path, created: list[Path]) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for parent in reversed(missing):
        parent.mkdir()
        created.append(parent)


def _remove(created: list[Path]) -> None:
    for folder in reversed(created):
        with suppress(OSError):  # another process may have put something there
            folder.rmdir()


@contextmanager
def _terminate_as_exception() -> Iterator[None]:
    """SIGTERM ends the block like an exception, so that what was staged is removed."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
