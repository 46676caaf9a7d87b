"""The record of what a run wrote into a folder: `.optimum_scap.json`, by which a later run may replace the folder.

A folder is ours if each file in it is in the record and is as it was written, as far as its size and a sample of its
content tell: the first and the last MiB and some in between.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr, ValidationError

from .. import __version__
from ..errors import first_line


RECORD = ".optimum_scap.json"

_PIECE = 1 << 20
_PIECES = 9


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: StrictInt
    sha256_of_sample: StrictStr


class _Record(BaseModel):
    """The content of the file: who wrote the folder, and every file by its path within the folder."""

    written_by: StrictStr
    files: dict[str, _File]


def write_record(folder: Path) -> None:
    """Writes the record of everything in `folder`, when all of it is on disk.

    Raises:
        OSError: if a file cannot be read or the record not written.
    """
    # What was copied from an earlier export would speak of other files.
    (folder / RECORD).unlink(missing_ok=True)
    record = _Record(written_by=f"optimum-scap {__version__}", files={})
    for name, path in _entries(folder).items():
        record.files[name] = _describe(path, on_disk=True)
    # Under its name only as a whole: half a record would keep a folder that was left behind from being removed.
    with open(folder / f"{RECORD}.new", "w", encoding="utf-8") as file:
        file.write(record.model_dump_json(indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / f"{RECORD}.new", folder / RECORD)


def unaccounted(folder: Path) -> str | None:
    """Why `folder` may hold something that no run wrote; None if it holds no file or all of it is in its record."""
    try:
        entries = _entries(folder)
    except OSError as error:
        return f"it cannot be looked through ({first_line(error)})"
    if not entries:
        return None
    if RECORD not in entries:
        first = min(entries)
        return f"it holds {first} and no record that optimum-scap wrote it ({RECORD})"
    try:
        content: Any = json.loads(entries.pop(RECORD).read_text(encoding="utf-8"))
        files = _Record.model_validate(content).files
    except (OSError, ValueError, RecursionError, ValidationError):
        return f"its record {RECORD} cannot be read"
    for name, path in sorted(entries.items()):
        if name not in files:
            return f"it holds {name}, which optimum-scap did not write"
        try:
            same = not path.is_symlink() and path.is_file() and _describe(path) == files[name]
        except OSError:
            same = False
        if not same:
            return f"{name} was changed since optimum-scap wrote it"
    return None


def _entries(folder: Path) -> dict[str, Path]:
    """Everything in `folder` but folders, by its path within; links are not followed."""

    def fail(error: OSError) -> None:
        raise error

    found = {}
    for base, folders, files in os.walk(folder, onerror=fail):
        for path in (Path(base) / name for name in (*folders, *files)):
            if path.is_symlink() or not path.is_dir():
                found[path.relative_to(folder).as_posix()] = path
    return found


def _describe(path: Path, on_disk: bool = False) -> _File:
    """Size and digest of a file; `on_disk` waits until the file is where a power cut leaves it."""
    with open(path, "rb") as file:
        if on_disk:
            os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256()
        for start in sorted({max(0, size - _PIECE) * index // (_PIECES - 1) for index in range(_PIECES)}):
            file.seek(start)
            digest.update(file.read(_PIECE))
        return _File(size=size, sha256_of_sample=digest.hexdigest())
