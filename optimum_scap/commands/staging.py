"""An output folder that appears complete or not at all."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import SCAPError


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

    An earlier export in `output` is replaced whole. Folders that killed processes left behind are removed.
    """
    check_output(output)
    output = output.absolute()
    created = _create_parents(output.parent)
    prefix = f".{output.name}.scap-"
    for stale in output.parent.glob(f"{prefix}*"):
        if not _is_alive(stale):
            shutil.rmtree(stale, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=output.parent))
    complete = staging / "complete"
    complete.mkdir()
    try:
        with _terminate_as_exception():
            yield complete
        _swap(complete, output, staging / "replaced")
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in reversed(created):
            folder.rmdir()
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
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def _create_parents(folder: Path) -> list[Path]:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for parent in reversed(missing):
        parent.mkdir()
    return list(reversed(missing))


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
