"""An output folder appears complete or not at all, and nothing is deleted but what a run wrote."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optimum_scap import SCAPError
from optimum_scap.commands import staging
from optimum_scap.commands.exchange import exchange
from optimum_scap.commands.record import RECORD, unaccounted, write_record
from optimum_scap.commands.staging import check_output, check_output_is_not_model, staged_output


def export(output: Path, content: str = "new") -> None:
    with staged_output(output) as folder:
        (folder / "config.json").write_text(content)
        (folder / "sub").mkdir()
        (folder / "sub" / "model.bin").write_text(content)


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECORD
    }


NEW = {"config.json": "new", "sub/model.bin": "new"}


def test_an_export_appears_with_its_record_and_is_replaced_by_the_next(tmp_path: Path) -> None:
    output = tmp_path / "a" / "OUT"
    export(output, "old")
    record = json.loads((output / RECORD).read_text())
    assert record["written_by"].startswith("optimum-scap") and set(record["files"]) == set(NEW)
    export(output)
    assert content(output) == NEW
    assert [path.name for path in output.parent.iterdir()] == ["OUT"]


@pytest.mark.parametrize(
    "files",
    [
        ["pom.xml", "src/precious.java", ".git/HEAD"],
        ["config.json"],
        ["config.json", "model.safetensors"],
        ["openvino_model.xml", "openvino_model.bin"],
        ["chapter.txt"],
        [".hidden"],
    ],
)
def test_what_others_wrote_is_not_replaced(files: list[str], tmp_path: Path) -> None:
    output = tmp_path / "OUT"
    for name in files:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("mine")
    with pytest.raises(SCAPError, match=r"OUT is not replaced: it holds .* and no record"):
        export(output)
    assert content(output) == dict.fromkeys(sorted(files), "mine")


def _add(output: Path) -> None:
    (output / "notes.txt").write_text("mine")


def _add_deep(output: Path) -> None:
    (output / "sub" / ".git").mkdir()
    (output / "sub" / ".git" / "HEAD").write_text("mine")


def _link(output: Path) -> None:
    (output / "data").symlink_to(output.parent)


def _edit(output: Path) -> None:
    (output / "config.json").write_text("NEW")


def _longer(output: Path) -> None:
    (output / "sub" / "model.bin").write_text("new and more")


def _replace_by_link(output: Path) -> None:
    (output / "config.json").rename(output.parent / "config.json")
    (output / "config.json").symlink_to(output.parent / "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_add, "it holds notes.txt, which optimum-scap did not write"),
        (_add_deep, "it holds sub/.git/HEAD, which"),
        (_link, "it holds data, which"),
        (_edit, "config.json was changed since"),
        (_longer, "sub/model.bin was changed since"),
        (_replace_by_link, "config.json was changed since"),
        (lambda output: (output / RECORD).write_text("{"), "its record .* cannot be read"),
        (lambda output: (output / RECORD).write_text('{"files": {"a": 1}}'), "its record .* cannot be read"),
        (lambda output: (output / RECORD).write_bytes(b"\xff"), "its record .* cannot be read"),
        (lambda output: (output / RECORD).write_text("[" * 100_000), "its record .* cannot be read"),
    ],
)
def test_an_export_that_was_changed_is_not_replaced(change, message: str, tmp_path: Path) -> None:
    output = tmp_path / "OUT"
    export(output)
    change(output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(SCAPError, match=message):
        export(output, "newer")
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob(".OUT.scap-*"))


def test_a_record_that_was_copied_along_speaks_for_nothing(tmp_path: Path) -> None:
    """Exports are copied file by file into new ones, records too."""
    export(tmp_path / "one", "one")
    with staged_output(tmp_path / "two") as folder:
        shutil.copytree(tmp_path / "one", folder, dirs_exist_ok=True)
        (folder / "config.json").write_text("two")
    assert unaccounted(tmp_path / "two") is None
    (tmp_path / "two" / "config.json").write_text("one")  # as the record of the first has it
    assert unaccounted(tmp_path / "two") is not None


def test_a_missing_file_does_not_keep_an_export_from_being_replaced(tmp_path: Path) -> None:
    export(tmp_path / "OUT", "old")
    (tmp_path / "OUT" / "config.json").unlink()
    (tmp_path / "OUT" / "empty").mkdir()
    export(tmp_path / "OUT")
    assert content(tmp_path / "OUT") == NEW


def test_a_file_that_appears_while_the_command_runs_is_kept(tmp_path: Path, exchanged: bool) -> None:
    output = tmp_path / "OUT"
    export(output, "old")
    with pytest.raises(SCAPError, match="it holds notes.txt"), staged_output(output) as folder:
        (folder / "config.json").write_text("new")
        (output / "notes.txt").write_text("mine")
    assert content(output) == {"config.json": "old", "notes.txt": "mine", "sub/model.bin": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["OUT"]


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchanged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways in which folders change places."""
    if not request.param:
        monkeypatch.setattr(staging, "exchange", lambda *_: False)
    return request.param


def test_folders_are_exchanged_where_linux_can(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    changed = exchange(tmp_path / "a", tmp_path / "b")
    # Some network file systems cannot; then nothing may have moved.
    assert (tmp_path / "a" / ("b" if changed else "a")).exists()
    if changed:
        with pytest.raises(FileNotFoundError):
            exchange(tmp_path / "a", tmp_path / "missing")


SIGNALED = """
import os, shutil, signal, sys, time
from pathlib import Path
from optimum_scap.commands import staging
from optimum_scap.commands.errors import errors_for_humans
output, number, moment, way = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
if moment == "ignored":
    signal.signal(number, signal.SIG_IGN)
if way == "renames":
    staging.exchange = lambda *_: False
rename, delete = Path.rename, shutil.rmtree

def renamed(self, target):
    result = rename(self, target)
    if moment == "rename":
        os.kill(os.getpid(), number)
    return result

def deleted(*arguments, **options):
    if moment == "delete":
        os.kill(os.getpid(), number)
    delete(*arguments, **options)

Path.rename, shutil.rmtree = renamed, deleted
with errors_for_humans("optimum-cli scap"), staging.staged_output(output) as folder:
    (folder / "config.json").write_text("new")
    (folder / "sub").mkdir()
    (folder / "sub" / "model.bin").write_text("new")
    if moment in ("work", "ignored"):
        os.kill(os.getpid(), number)
        time.sleep(0.2)
"""


def signaled(output: Path, number: signal.Signals, moment: str, way: str) -> subprocess.CompletedProcess[str]:
    """An export in a process of its own that sends itself a signal at a certain moment."""
    command = [sys.executable, "-c", SIGNALED, str(output), str(int(number)), moment, way]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(("moment", "way"), [("delete", "exchange"), ("delete", "renames"), ("rename", "renames")])
def test_a_signal_while_folders_change_places_waits(
    number: signal.Signals, moment: str, way: str, tmp_path: Path
) -> None:
    output = tmp_path / "OUT"
    export(output, "old")
    result = signaled(output, number, moment, way)
    assert result.returncode == 128 + number, result.stderr
    assert f"{output} was written" in result.stderr
    assert content(output) == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["OUT"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_that_leaves_the_old_export(number: signal.Signals, tmp_path: Path) -> None:
    export(tmp_path / "OUT", "old")
    result = signaled(tmp_path / "OUT", number, "work", "exchange")
    assert result.returncode == 128 + number, result.stderr
    assert "nothing was written" in result.stderr
    assert set(content(tmp_path / "OUT").values()) == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["OUT"]


def test_signals_that_are_ignored_stay_ignored(tmp_path: Path) -> None:
    """nohup ignores SIGHUP, a shell SIGINT of its background jobs."""
    for number in (signal.SIGHUP, signal.SIGINT):
        result = signaled(tmp_path / "OUT", number, "ignored", "exchange")
        assert result.returncode == 0, result.stderr
        assert content(tmp_path / "OUT") == NEW


ENDLESS_EXPORTS = """
import itertools, sys
from pathlib import Path
from optimum_scap.commands import staging
from optimum_scap.commands.errors import errors_for_humans
if sys.argv[2] == "renames":
    staging.exchange = lambda *_: False
print("ready", flush=True)
with errors_for_humans("exports"):
    for version in itertools.count(int(sys.argv[3])):
        with staging.staged_output(Path(sys.argv[1])) as folder:
            for name in range(8):
                (folder / f"{name}.bin").write_text(str(version))
"""


def ended_by(number: signal.Signals, process: subprocess.Popen[str]) -> str:
    """Sends the signal until the process ends: Python drops what a handler raises while objects are finalized."""
    for _ in range(60):
        process.send_signal(number)
        try:
            return process.communicate(timeout=2)[1]
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError(f"{number.name} does not end the process")


def kill_exports(tmp_path: Path, kills: int, way: str) -> None:
    """Exports to one folder, one after another, killed at random moments."""
    output = tmp_path / "OUT"
    moments = random.Random(7)
    export(output, "0")
    for kill in range(kills):
        number = moments.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS_EXPORTS, str(output), way, str(kill * 1000)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        left = set(tmp_path.glob(".OUT.scap-*"))  # by those that could not clean up
        time.sleep(moments.uniform(0.0, 0.06))
        errors = ended_by(number, process)
        # Between two exports SIGTERM ends the process as ever.
        assert process.returncode in (-number, 128 + number), errors
        assert output.exists() or way == "renames" and list(tmp_path.glob(".OUT.scap-*/replaced")), (kill, number)
        if output.exists():
            assert unaccounted(output) is None
            found = content(output)
            assert len(set(found.values())) == 1 and len(found) in (2, 8), (kill, number, found)
        if number != signal.SIGKILL:
            assert set(tmp_path.glob(".OUT.scap-*")) <= left
    with staged_output(output) as folder:  # tidies up behind all of them
        assert output.exists()
        (folder / "config.json").write_text("last")
    assert [path.name for path in tmp_path.iterdir()] == ["OUT"]
    assert content(output) == {"config.json": "last"}


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_killed_at_random_moments(way: str, tmp_path: Path) -> None:
    kill_exports(tmp_path, 8, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_killed_at_many_random_moments(way: str, tmp_path: Path) -> None:
    kill_exports(tmp_path, 100, way)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path: Path) -> None:
    """Process ids say nothing: in a container every run has the same, on a shared disk they are another machine's."""
    (tmp_path / ".OUT.scap-1-old").mkdir()
    dead = tmp_path / f".OUT.scap-{os.getpid()}-dead"
    (dead / "complete").mkdir(parents=True)
    (dead / "complete" / "model.bin").touch()
    (dead / ".optimum_scap.lock").touch()
    others = tmp_path / ".OUT.scap-notes"
    others.mkdir()
    (others / "chapter.txt").write_text("mine")
    (tmp_path / ".OUT.scap-link").symlink_to(others)
    with staged_output(tmp_path / "OUT") as first:
        (first / "config.json").write_text("first")
        with staged_output(tmp_path / "OUT") as second:
            assert first.exists()
            (second / "config.json").write_text("second")
        assert not dead.exists() and not (tmp_path / ".OUT.scap-1-old").exists()
        assert content(tmp_path / "OUT") == {"config.json": "second"}
    assert content(tmp_path / "OUT") == {"config.json": "first"}
    assert (others / "chapter.txt").read_text() == "mine" and (tmp_path / ".OUT.scap-link").is_symlink()


def test_a_process_killed_while_it_writes_its_record_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: int) -> None:
        raise SystemExit(9)

    left = tmp_path / ".OUT.scap-dead"
    (left / "complete").mkdir(parents=True)
    (left / ".optimum_scap.lock").touch()
    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(SystemExit):
        write_record(left / "complete")
    monkeypatch.undo()
    assert [path.name for path in (left / "complete").iterdir()] == [f"{RECORD}.new"]
    export(tmp_path / "OUT")
    assert not left.exists()


def test_what_a_killed_process_left_is_kept_where_users_put_something(tmp_path: Path) -> None:
    """The old export, moved away by a process that was killed before it looked at it again."""
    left = tmp_path / ".OUT.scap-dead"
    export(left / "complete", "old")
    (left / ".optimum_scap.lock").touch()
    (left / "complete" / "notes.txt").write_text("mine")
    export(tmp_path / "OUT")
    assert (left / "complete" / "notes.txt").read_text() == "mine"


def test_the_old_export_comes_back_when_a_process_was_killed_between_two_renames(tmp_path: Path) -> None:
    left = tmp_path / ".OUT.scap-dead"
    export(left / "replaced", "new")
    (left / ".optimum_scap.lock").touch()
    with pytest.raises(RuntimeError), staged_output(tmp_path / "OUT"):
        raise RuntimeError
    assert content(tmp_path / "OUT") == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["OUT"]


@pytest.mark.parametrize(
    "error", [NotImplementedError("FileSystem does not appear to support flock"), OSError(errno.ENOLCK, "No locks")]
)
def test_file_systems_without_locks(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: object) -> None:
        raise error

    left = tmp_path / ".OUT.scap-somebody"
    (left / "complete").mkdir(parents=True)
    (left / ".optimum_scap.lock").touch()
    monkeypatch.setattr(staging, "_locked", cannot)
    export(tmp_path / "OUT", "old")
    export(tmp_path / "OUT")
    assert content(tmp_path / "OUT") == NEW
    # Whether its process lives cannot be told.
    assert {path.name for path in tmp_path.iterdir()} == {"OUT", left.name}


def test_a_failure_removes_the_folders_that_were_made_for_the_output(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staged_output(tmp_path / "a" / "b" / "OUT"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_an_output_around_the_current_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tmp_path / "OUT")
    for here in ("OUT", "OUT/sub"):
        monkeypatch.chdir(tmp_path / here)
        with pytest.raises(SCAPError, match="current folder"):
            check_output(tmp_path / "OUT")


def test_a_mount_point_as_output_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's volume: renaming it fails, and what is beside it lies on another disk."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with pytest.raises(SCAPError, match="is a mount point"):
        check_output(tmp_path / "out")
    check_output(tmp_path / "out" / "inside")


def test_a_link_as_output_replaces_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "OUT")
    export(tmp_path / "link", "old")
    export(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "OUT") == NEW


def test_an_output_inside_or_around_the_model(tmp_path: Path) -> None:
    model = tmp_path / "models" / "m"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    check_output_is_not_model(model / "out", model)
    for output in (model / "out", model / "a" / "b", tmp_path / "link" / "out"):
        with pytest.raises(SCAPError, match="is inside the model folder"):
            check_output_is_not_model(output, model, copied=True)
    with pytest.raises(SCAPError, match="is the model folder itself"):
        check_output_is_not_model(tmp_path / "link", model)
    with pytest.raises(SCAPError, match="holds the model folder"):
        check_output_is_not_model(model.parent, model)


@pytest.mark.parametrize("place", [0, 10 << 20, (20 << 20) - 1])
def test_the_record_covers_what_lies_deep_and_all_of_a_large_file(place: int, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    file = tmp_path / "a" / "b" / "c"
    file.write_bytes(b"x" * (20 << 20))
    write_record(tmp_path)
    assert unaccounted(tmp_path) is None
    with file.open("r+b") as changed:
        changed.seek(place)
        changed.write(b"y")
    assert unaccounted(tmp_path) == "a/b/c was changed since optimum-scap wrote it"
    file.write_bytes(b"x" * (20 << 20) + b"y")
    assert unaccounted(tmp_path) == "a/b/c was changed since optimum-scap wrote it"
