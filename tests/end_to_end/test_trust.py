"""What commands write, replace and delete, what an interruption or a full disk leaves, and what never runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import optimum_cli_in_process

from optimum_scap import SCAPError, disk
from optimum_scap.commands.record import RECORD, unaccounted
from optimum_scap.openvino import files as openvino_folder
from optimum_scap.openvino.files import files_to_copy, read_folder_parameters


CALIBRATION = ("--scap", "0.5", "--scap-num-samples", "2", "--scap-seq-len", "32", "--scap-dataset")


def apply_to(tiny: Path, output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return optimum_cli_in_process("scap", "apply", tiny / "dense", output, *CALIBRATION, tiny / "text.txt", *flags)


def test_somebodys_project_is_not_taken_for_an_export(tiny: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    for name in ("pom.xml", "config.json", "openvino_model.xml", "src/precious.java", ".git/HEAD"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("mine")
    for command in (
        ("scap", "fuse", tiny / "sparse", project),
        ("scap", "apply", tiny / "dense", project, "--scap", "0.5"),
        ("export", "torch", "-m", tiny / "hf", project, "--scap", "0.5"),
        ("export", "openvino", "-m", tiny / "hf", project, "--scap", "0.5"),
    ):
        result = optimum_cli_in_process(*command)
        assert result.returncode == 1 and "is not replaced: it holds" in result.stderr
    assert {path.read_text() for path in project.rglob("*") if path.is_file()} == {"mine"}
    assert len([path for path in project.rglob("*") if path.is_file()]) == 5


def test_an_earlier_export_is_replaced(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "OUT"
    for sparsity in ("0.3", "0.6"):
        assert apply_to(tiny, output, "--scap-mode", "zero").returncode == 0
        result = optimum_cli_in_process(
            *("scap", "apply", tiny / "dense", output, "--scap", sparsity, "--scap-num-samples", "2"),
            *("--scap-seq-len", "32", "--scap-dataset", tiny / "text.txt"),
        )
        assert result.returncode == 0, result.stderr
        layers = read_folder_parameters(output)["openvino_model.xml"].layers
        assert {layer.target_sparsity for layer in layers.values()} == {float(sparsity)}
    assert unaccounted(output) is None and (output / RECORD).exists()


def test_an_output_inside_the_model_folder(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "m"
    shutil.copytree(tiny / "sparse", model)
    before = sorted(model.iterdir())
    result = optimum_cli_in_process("scap", "fuse", model, model / "fused")
    assert result.returncode == 1 and "is inside the model folder" in result.stderr
    assert len(result.stderr) < 1000 and sorted(model.iterdir()) == before


MODULES = (
    "pickle",
    "struct",
    "tempfile",
    "json",
    "numpy",
    "torch",
    "openvino",
    "optimum_scap",
    "sitecustomize",
    "_bz2",
)


@pytest.mark.parametrize(
    "command", ["info", *(pytest.param(name, marks=pytest.mark.slow) for name in ("benchmark", "fuse", "apply"))]
)
def test_no_code_of_a_model_folder_runs(command: str, tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "m"
    shutil.copytree(tiny / ("dense" if command == "apply" else "sparse"), model)
    for name in MODULES:
        (model / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\nraise SystemExit(7)")
    arguments = {
        "benchmark": ["--prompt-tokens", "4", "--new-tokens", "2", "--repeats", "1"],
        "fuse": [tmp_path / "out"],
        "info": [],
        "apply": [tmp_path / "out", *CALIBRATION, tiny / "text.txt"],
    }[command]
    script = Path(sys.executable).with_name("optimum-cli")
    result = subprocess.run(
        [str(script), "scap", command, ".", *map(str, arguments)],
        cwd=model,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


def test_pickles_are_not_read(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "m"
    shutil.copytree(tiny / "hf", model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    for framework in ("openvino", "torch"):
        result = optimum_cli_in_process("export", framework, "-m", model, tmp_path / "OUT", "--scap", "0.5")
        assert result.returncode == 1 and "safetensors" in result.stderr, result.stderr
    assert not (tmp_path / "OUT").exists()


def test_links_out_of_a_model_folder_are_not_followed(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")

    def model(name: str) -> Path:
        shutil.copytree(tiny / "dense", tmp_path / name)
        return tmp_path / name

    for name, target in (("README.md", "private/key"), ("data", "private"), ("root", ".."), ("gone", "missing")):
        folder = model(f"with-{name}")
        (folder / name).symlink_to(tmp_path / target)
        result = optimum_cli_in_process("scap", "apply", folder, tmp_path / "OUT", "--scap", "0.5")
        assert result.returncode == 1 and f"{name} is a link to" in result.stderr, result.stderr
        assert not (tmp_path / "OUT").exists()
    loop = model("with-loop")
    (loop / "loop").symlink_to(loop)
    with pytest.raises(SCAPError, match="loop is a link"):
        files_to_copy(loop)
    inside = model("with-link-inside")
    (inside / "copy.json").symlink_to("config.json")
    assert files_to_copy(inside)["copy.json"].read_text() == (tiny / "dense" / "config.json").read_text()


def test_the_hubs_cache_is_a_model_folder_too(tiny: Path, tmp_path: Path) -> None:
    """There every file is a link to a blob beside the snapshots."""
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "0123"
    blobs = tmp_path / "models--me--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate((tiny / "dense").iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    result = optimum_cli_in_process("scap", "apply", snapshot, tmp_path / "OUT", *CALIBRATION, tiny / "text.txt")
    assert result.returncode == 0, result.stderr
    assert not any(path.is_symlink() for path in (tmp_path / "OUT").iterdir())
    assert read_folder_parameters(tmp_path / "OUT")


def test_links_into_the_hubs_cache(tiny: Path, tmp_path: Path) -> None:
    """Older clients of the hub downloaded into a folder of links."""
    blobs = tmp_path / "hub" / "models--me--tiny" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copy(tiny / "dense" / "config.json", blobs / "0123")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").symlink_to(blobs / "0123")
    assert list(files_to_copy(tmp_path / "m")) == ["config.json"]


def test_file_systems_that_do_not_tell_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=0, free=0))
    disk.check_space(tmp_path, 1 << 40)
    assert not disk.is_disk_full(RuntimeError("basic_ios::clear: iostream error"), tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    assert disk.is_disk_full(RuntimeError("basic_ios::clear: iostream error"), tmp_path)
    with pytest.raises(disk.DiskFullError):
        disk.check_space(tmp_path, 1)


def test_what_git_and_the_hub_keep_does_not_go_along(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "m"
    shutil.copytree(tiny / "dense", model)
    for name in (".git/HEAD", ".cache/huggingface/x", "extra/note.txt"):
        (model / name).parent.mkdir(parents=True)
        (model / name).touch()
    assert {name for name in files_to_copy(model) if "/" in name} == {"extra/note.txt"}


def test_space_is_asked_for_before_calibration(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 16)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    for command in (("scap", "fuse", tiny / "sparse"), ("scap", "apply", tiny / "dense")):
        more = () if command[1] == "fuse" else (*CALIBRATION, tiny / "text.txt")
        result = optimum_cli_in_process(*command, tmp_path / "OUT", *more)
        assert result.returncode == 1, result.stderr
        assert f"error: no space left on {tmp_path} (0 MiB free, " in result.stderr and "needed)" in result.stderr
        assert "calibration" not in result.stderr.lower()
    assert not list(tmp_path.iterdir())


FILL = """
import sys
from contextlib import redirect_stderr
import io
from pathlib import Path
from command_line import optimum_cli_in_process
from optimum_scap import disk
from optimum_scap import folders as folder
folder.check_space = lambda *_: None  # the disk fills up behind the check
disks, *command = sys.argv[1:]
for disk_folder in sorted(Path(disks).iterdir()):
    result = optimum_cli_in_process(*[part.replace("OUT", str(disk_folder / "OUT")) for part in command])
    last = result.stderr.strip().splitlines()[-1:] or [""]
    print(result.returncode, len(list(disk_folder.iterdir())), last[0].replace("\\n", " "), sep="|", flush=True)
"""


def fill_disks(command: list[str | Path], sizes: list[int], tmp_path: Path) -> list[tuple[int, int, str]]:
    """(exit code, entries left on the disk, last line of stderr) of a command that writes to disks of so many KiB."""
    disks = tmp_path / "disks"
    mounts = []
    for size in sizes:
        (disks / f"{size:06}").mkdir(parents=True)
        mounts.append(f"mount -t tmpfs -o size={size}k tmpfs {disks}/{size:06}")
    python = [sys.executable, "-c", FILL, str(disks), *map(str, command)]
    result = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh", *python],
        capture_output=True,
        text=True,
        timeout=3000,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split("|", 2) for line in result.stdout.splitlines() if line.count("|") >= 2]
    return [(int(code), int(entries), message) for code, entries, message in lines]


def needs_small_disks() -> None:
    works = shutil.which("unshare") and subprocess.run(
        ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
    )
    if not works or works.returncode != 0:
        pytest.skip("small disks cannot be made here (unshare and tmpfs)")


def full_disks(tiny: Path, tmp_path: Path, count: int) -> None:
    needs_small_disks()
    needed = sum(path.stat().st_size for path in (tiny / "sparse").iterdir()) // 1024
    sizes = sorted({8 + needed * 3 // 2 * step // count for step in range(count)})
    for command in (
        ["scap", "fuse", tiny / "sparse", "OUT"],
        ["scap", "apply", tiny / "dense", "OUT", *CALIBRATION, tiny / "text.txt"],
    ):
        outcomes = fill_disks(command, sizes, tmp_path / str(command[1]))
        assert len(outcomes) == len(sizes)
        failed = [outcome for outcome in outcomes if outcome[0] != 0]
        assert len(failed) >= count // 3
        for code, entries, message in failed:
            assert code == 1, message
            assert "error: no space left on " in message and len(message) < 300, message
            # What calibration found may be beside the output, if there was space for that.
            assert entries <= (command[1] == "apply"), message


@pytest.mark.slow
def test_a_full_disk_is_named_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    full_disks(tiny, tmp_path, 9)


@pytest.mark.slow
def test_disks_of_many_sizes(tiny: Path, tmp_path: Path) -> None:
    full_disks(tiny, tmp_path, 100)


def test_what_calibration_found_outlives_a_failure_behind_it(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise SCAPError("it could not be written")

    output = tmp_path / "OUT"
    kept = tmp_path / "OUT.scap-parameters.json"
    kept.write_text("mine")  # which is not overwritten
    with monkeypatch.context() as patch:
        patch.setattr(openvino_folder, "save_model", fails)
        result = apply_to(tiny, output)
    assert result.returncode == 1 and "error: it could not be written" in result.stderr
    file = tmp_path / "OUT.scap-parameters-2.json"
    assert f"The calibrated parameters are in {file}; --scap-parameters applies them" in result.stderr
    assert kept.read_text() == "mine" and {path.name for path in tmp_path.iterdir()} == {kept.name, file.name}
    result = optimum_cli_in_process("scap", "apply", tiny / "dense", output, "--scap-parameters", file)
    assert result.returncode == 0, result.stderr
    found = read_folder_parameters(output)["openvino_model.xml"]
    assert found.model_dump(mode="json") == json.loads(file.read_text())


def test_a_file_that_appears_in_the_output_during_calibration_costs_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "OUT"
    assert apply_to(tiny, output).returncode == 0
    save = openvino_folder.save_model

    def saves(*arguments: object) -> None:
        (output / "notes.txt").write_text("mine")
        save(*arguments)

    monkeypatch.setattr(openvino_folder, "save_model", saves)
    result = apply_to(tiny, output)
    assert result.returncode == 1 and "it holds notes.txt, which optimum-scap did not write" in result.stderr
    assert (output / "notes.txt").read_text() == "mine" and read_folder_parameters(output)
    assert (tmp_path / "OUT.scap-parameters.json").exists()


KILL = """
import os, random, signal, sys, time
from pathlib import Path
# All that takes long to import, once: every command is a fork of this process, and dies at work, not while importing.
import optimum.intel, openvino, torch
from optimum.commands import optimum_cli as script
import optimum_scap.openvino.modeling
from optimum_scap.commands.record import unaccounted
from optimum_scap.openvino.files import read_folder_parameters  # noqa: F401
kills, output, *command = sys.argv[1:]
output, moments = Path(output), random.Random(11)

def start():
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["optimum-cli", *command]
        script.main()
        os._exit(0)
    return child

started = time.monotonic()
assert os.waitpid(start(), 0)[1] == 0
duration = time.monotonic() - started
for _ in range(int(kills)):
    number = moments.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    left = set(output.parent.glob(".OUT.scap-*"))
    child = start()
    time.sleep(duration * moments.uniform(0.0, 1.1))
    status = None
    for _ in range(600):  # again and again: Python drops what a handler raises while objects are finalized
        os.kill(child, number)
        time.sleep(0.2)
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
    assert done, f"{number.name} does not end the command"
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -number, 128 + number), (number.name, code)
    assert unaccounted(output) is None, number.name
    new = set(output.parent.glob(".OUT.scap-*")) - left
    assert number == signal.SIGKILL or not new, (number.name, [str(path) for path in new])
    print(number.name, code, flush=True)
assert os.waitpid(start(), 0)[1] == 0
"""


def kill_commands(tiny: Path, tmp_path: Path, kills: int) -> None:
    """A real command over an earlier export, killed at random moments of its life."""
    output = tmp_path / "OUT"
    command = ["scap", "apply", tiny / "dense", output, *CALIBRATION, tiny / "text.txt"]
    result = subprocess.run(
        [sys.executable, "-c", KILL, str(kills), str(output), *map(str, command)],
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert result.returncode == 0, result.stderr
    ends = [line.split() for line in result.stdout.splitlines() if line.startswith("SIG")]
    assert len(ends) == kills
    assert sum(code != "0" for _, code in ends) >= kills // 2, ends
    assert unaccounted(output) is None and read_folder_parameters(output)
    assert not list(tmp_path.glob(".OUT.scap-*"))
    assert all(path.name.startswith(("OUT.scap-parameters", "OUT")) for path in tmp_path.iterdir())


def test_commands_killed_at_random_moments(tiny: Path, tmp_path: Path) -> None:
    kill_commands(tiny, tmp_path, 8)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_commands_killed_at_many_random_moments(tiny: Path, tmp_path: Path) -> None:
    kill_commands(tiny, tmp_path, 100)
