"""An output folder that appears complete or not at all, and that replaces nothing but what an earlier run wrote.

What a run writes grows in `.OUT.scap-*` beside OUT, under a lock that ends with the process. When it is complete it
gets a record of its files and takes OUT's place in one step. An OUT that is there already is replaced if its record
accounts for every file in it.
"""

import atexit
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..disk import DiskFullError, is_disk_full
from ..errors import SCAPError, first_line
from .exchange import exchange
from .record import RECORD, unaccounted, write_record
from .signals import signals_as_exceptions, signals_deferred


_LOCK = ".optimum_scap.lock"
_SCRATCH = "scratch"
# What network file systems answer that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def check_output(output: Path) -> None:
    """Checks that `output` can become an exported folder: it is absent, empty, or what an earlier run wrote.

    Raises:
        SCAPError: otherwise.
    """
    if output.is_dir():
        _check_is_ours(output, output)
        here = Path.cwd()
        if output.resolve() in (here, *here.parents):
            raise SCAPError(f"output folder {output} is, or is around, the current folder; choose another")
        if os.path.ismount(output.resolve()):
            raise SCAPError(f"output folder {output} is a mount point, which cannot be replaced; choose one inside it")
    elif output.exists():
        raise SCAPError(f"output {output} exists and is not a folder")
    parent = _existing_parent(output)
    if not parent.is_dir():
        raise SCAPError(f"output {output} cannot be created: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise SCAPError(f"output {output} cannot be created: no permission to write in {parent}")


def check_output_is_not_model(output: Path, model: str | Path, *, copied: bool = False) -> None:
    """Checks that `output`, which is replaced as a whole, is neither the model folder nor around it.

    `copied` says that the model folder is copied as a whole, so that `output` cannot be inside it either.

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
    if copied and source in target.parents:
        raise SCAPError(f"output folder {output} is inside the model folder {model}, which is copied; choose another")


@contextmanager
def staged_output(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its place when the block ends well and is removed when not.

    An earlier export in `output` is replaced whole; of a link, what it points to. Folders that killed processes left
    behind are removed. SIGINT, SIGTERM and SIGHUP end the block as exceptions, and wait while folders change places.

    Raises:
        SCAPError: if `output` cannot be written or replaced, or the disk is full.
    """
    check_output(output)
    staging = _Staging(output.resolve())
    written = False
    with signals_as_exceptions():
        try:
            with signals_deferred():
                staging.create()
            yield staging.complete
            write_record(staging.complete)
            with signals_deferred(f"{output} was written"):
                staging.take_place()
                written = True
                staging.delete()
        except BaseException as error:
            if written:  # a signal that waited
                raise
            full = None
            if is_disk_full(error, output):  # before what was staged makes space again
                full = DiskFullError(output.parent, getattr(error, "needed", None))
            staging.abandon()
            if full is not None:
                raise full from error
            raise


def scratch_folder(staged: Path) -> Path:
    """A new folder beside what `staged_output` gave, for what is needed on the way; it goes when the block ends."""
    folder = staged.with_name(_SCRATCH)
    folder.mkdir()
    return folder


class _Staging:
    """The folder `.OUT.scap-*` beside `output`: the new export in `complete`, and a lock for as long as it is used."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._parents: list[Path] = []
        self._folder: Path | None = None
        self._lock: FileLock | None = None

    @property
    def complete(self) -> Path:
        assert self._folder is not None
        return self._folder / "complete"

    def create(self) -> None:
        try:
            self._create_parents()
            _clean_up_after_killed(self._output)
            while self._lock is None:
                self._folder = Path(tempfile.mkdtemp(prefix=f".{self._output.name}.scap-", dir=self._output.parent))
                try:
                    self._lock = _locked(self._folder)
                except FileNotFoundError:  # another run took the empty folder for one left behind
                    continue
                except (NotImplementedError, OSError) as error:
                    if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                        raise
                    # A file system without locks: nobody will clean up there.
                    (self._folder / _LOCK).touch()
                    self._lock = FileLock(self._folder / _LOCK)
            self.complete.mkdir()
            # For a signal at a moment when no block is there to be ended: while one begins or is over.
            atexit.register(self.abandon)
        except OSError as error:
            raise SCAPError(f"output {self._output} cannot be created: {first_line(error)}") from error

    def take_place(self) -> None:
        """Puts `complete` where `output` is.

        Where the file system can exchange folders there is a whole one in that place at every moment; where it cannot,
        `replaced` holds the old one in between.
        """
        assert self._folder is not None
        output, old = self._output, self.complete
        if output.exists() and not any(output.iterdir()):
            output.rmdir()
        if not output.exists():
            self.complete.rename(output)
            return
        if not exchange(self.complete, output):
            old = self._folder / "replaced"
            output.rename(old)
            try:
                self.complete.rename(output)
            except OSError:
                old.rename(output)
                raise
        try:
            _check_is_ours(old, output)  # somebody may have put a file there since the run began
        except SCAPError:
            if old == self.complete:
                exchange(self.complete, output)
            else:
                output.rename(self.complete)
                old.rename(output)
            raise

    def delete(self) -> None:
        """Deletes the folder with what is still in it."""
        atexit.unregister(self.abandon)
        if self._folder is None:
            return
        if self._lock is not None:
            _delete(self._folder, self._lock)
        else:
            shutil.rmtree(self._folder, ignore_errors=True)

    def abandon(self) -> None:
        """Deletes the folder, and those above it that were made for the output."""
        with signals_deferred():
            self.delete()
            for folder in reversed(self._parents):
                with suppress(OSError):  # another process may have put something there
                    folder.rmdir()

    def _create_parents(self) -> None:
        missing = []
        folder = self._output.parent
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for parent in reversed(missing):
            parent.mkdir()
            self._parents.append(parent)


def _check_is_ours(folder: Path, name: Path) -> None:
    """Checks that an earlier run wrote everything in `folder`, which is called `name` in the message."""
    foreign = unaccounted(folder)
    if foreign is not None:
        raise SCAPError(
            f"output folder {name} is not replaced: {foreign}; choose another folder, or move what you want to keep "
            "and delete the rest"
        )


def _locked(staging: Path) -> FileLock:
    """The lock of a staging folder. The system gives it back when the process ends, however it ends."""
    lock = FileLock(staging / _LOCK)
    lock.acquire(blocking=False)
    return lock


def _clean_up_after_killed(output: Path) -> None:
    """Removes the staging folders of `output` whose processes are gone; puts an old export back that one had moved."""
    for staging in output.parent.glob(f".{glob.escape(output.name)}.scap-*"):
        if staging.is_symlink() or not staging.is_dir():
            continue
        if not (staging / _LOCK).is_file():
            with suppress(OSError):
                if all(path.name.startswith(_LOCK) for path in staging.iterdir()):  # killed while it made its lock
                    shutil.rmtree(staging)
            continue
        try:
            lock = _locked(staging)
        except (Timeout, OSError, NotImplementedError):  # its process lives, or nobody can tell
            continue
        if (staging / "replaced").exists() and not output.exists():
            (staging / "replaced").rename(output)
        _delete(staging, lock)


def _delete(staging: Path, lock: FileLock) -> None:
    """Deletes a staging folder, unless there is an old export in it that holds more than was written."""
    parts = [staging / "complete", staging / "replaced", staging / _SCRATCH]
    if any((part / RECORD).exists() and unaccounted(part) is not None for part in parts):
        lock.release()
        return
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)
    # The lock goes last: a process that is killed here leaves what the next one knows as its own.
    with suppress(OSError):  # Windows deletes no file that is open
        (staging / _LOCK).unlink()
    lock.release()
    with suppress(OSError):
        (staging / _LOCK).unlink()
    with suppress(OSError):  # a part that could not be deleted
        staging.rmdir()


def _existing_parent(path: Path) -> Path:
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    return parent
