# SPDX-License-Identifier: Apache-2.0
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from command_line import optimum_cli_in_process
from filelock import FileLock
from synthetic import gated_ffn, samples

from optimum_scap import sparsify_activations
from optimum_scap.openvino.extension import build
from optimum_scap.openvino.extension.build import ExtensionBuildError, build_extension
from optimum_scap.openvino.modeling import fused_clone


@pytest.fixture
def slow_compiler(tmp_path, monkeypatch):
    """Stands in for a compiler: logs its runs, takes a moment, writes its output in two halves."""
    script, log = tmp_path / "slow-c++", tmp_path / "runs"
    script.write_text(
        f"""#!{sys.executable}
import sys, time
if "--version" in sys.argv:
    sys.exit(print("slow 1.0"))
open({str(log)!r}, "a").write("run\\n")
with open(sys.argv[sys.argv.index("-o") + 1], "w") as out:
    out.write("half"); out.flush(); time.sleep(1); out.write("done")
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return log


def test_concurrent_first_uses_build_once(slow_compiler, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build_extension(cache_dir=tmp_path / "cache"), range(4)))
    assert len(paths) == 1
    assert paths.pop().read_text() == "halfdone"
    assert slow_compiler.read_text() == "run\n"


def test_a_killed_build_leaves_no_library(slow_compiler, tmp_path):
    cache = tmp_path / "cache"
    code = (
        f"from optimum_scap.openvino.extension.build import build_extension; build_extension(cache_dir={str(cache)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    while not slow_compiler.exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not list(cache.glob("*/*/liboptimum_scap.*"))
    library = build_extension(cache_dir=cache)
    assert library.read_text() == "halfdone"
    assert not list(library.parent.glob("build-*"))


def test_the_library_is_found_again_and_keyed_by_what_shapes_it(slow_compiler, tmp_path, monkeypatch):
    first = build_extension(cache_dir=tmp_path)
    assert build_extension(cache_dir=tmp_path) == first
    assert slow_compiler.read_text() == "run\n"
    assert build_extension("portable", cache_dir=tmp_path) != first
    monkeypatch.setattr(build.importlib.metadata, "version", lambda name: "2099.1")
    assert build_extension(cache_dir=tmp_path) != first


def test_environment_names_the_cache_and_the_instruction_set(slow_compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIMUM_SCAP_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("OPTIMUM_SCAP_ISA", "portable")
    assert build_extension() == build_extension("portable", tmp_path / "here")
    monkeypatch.setenv("OPTIMUM_SCAP_ISA", "mmx")
    with pytest.raises(ExtensionBuildError, match="mmx"):
        build_extension()


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExtensionBuildError, match="no C\\+\\+ compiler"):
        build_extension(cache_dir=tmp_path)
    monkeypatch.setenv("CXX", "missing-c++ -O0")
    with pytest.raises(ExtensionBuildError, match="missing-c"):
        build_extension(cache_dir=tmp_path)


def test_a_compiler_error_is_reported_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", f"{build.find_compiler()[0]} -fno-such-flag")
    with pytest.raises(ExtensionBuildError, match="no-such-flag") as caught:
        build_extension(cache_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*/*/liboptimum_scap.*"))


def test_no_headers(tmp_path, monkeypatch):
    class Spec:
        submodule_search_locations = [str(tmp_path)]

    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(ExtensionBuildError, match="headers"):
        build_extension(cache_dir=tmp_path)


FIRST_USE = """
import json, sys
import numpy as np, openvino as ov
from optimum_scap.openvino.extension.nodes import create_linear
from optimum_scap.openvino.extension.packing import pack_float
x = ov.opset13.parameter([1, 64], np.float32)
node = create_linear(x, [pack_float(np.full((3, 64), 0.5, np.float32))], threshold=0.5)
compiled = ov.Core().compile_model(ov.Model([node.output(0)], [x]), "CPU")
print(json.dumps(compiled(np.arange(64, dtype=np.float32)[None])[0].tolist()))
"""


def test_four_processes_that_use_it_first_at_once_build_it_once_and_all_run(tmp_path):
    script, log = tmp_path / "logging-c++", tmp_path / "runs"
    compiler = build.find_compiler()[0]
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] || echo run >> {log}\nexec {compiler} "$@"\n')
    script.chmod(0o755)
    cache = tmp_path / "cache"
    environment = {
        **os.environ, "CXX": str(script), "OPTIMUM_SCAP_CACHE": str(cache), "OPTIMUM_SCAP_ISA": "portable"
    }  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, "-c", FIRST_USE], env=environment, stdout=-1, stderr=-1, text=True)
        for _ in range(4)
    ]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert json.loads(out) == [[64 * 63 / 4] * 3]
    assert log.read_text() == "run\n"
    assert len(list(cache.glob("*/*/liboptimum_scap.so"))) == 1


@pytest.mark.parametrize("keep", (0, 0.5, 0.99))
def test_a_truncated_library_is_built_again(keep, slow_compiler, tmp_path):
    library = build_extension(cache_dir=tmp_path)
    library.write_text("halfdone"[: int(keep * 8)])
    assert build_extension(cache_dir=tmp_path) == library
    assert library.read_text() == "halfdone"
    assert slow_compiler.read_text() == "run\n" * 2


@pytest.mark.parametrize("content", (b"", b"\xff\xfe", b"0" * 64, "caf\u00e9".encode("latin-1")))
def test_a_damaged_digest_has_the_library_built_again(content, slow_compiler, tmp_path):
    library = build_extension(cache_dir=tmp_path)
    digest = library.with_name(f"{library.name}.sha256")
    intact = digest.read_bytes()
    digest.write_bytes(content)
    assert build_extension(cache_dir=tmp_path) == library
    assert digest.read_bytes() == intact
    assert slow_compiler.read_text() == "run\n" * 2


def test_the_path_is_absolute(slow_compiler, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPTIMUM_SCAP_CACHE", "named")
    for library, folder in ((build_extension(), "named"), (build_extension(cache_dir="given"), "given")):
        assert library.is_absolute() and library.is_relative_to(tmp_path / folder)


def test_a_path_that_is_no_utf8(slow_compiler, tmp_path, monkeypatch):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    monkeypatch.setenv("CXX", shutil.copy(os.environ["CXX"], folder))
    assert build_extension(cache_dir=Path(folder)).read_text() == "halfdone"


def test_a_build_that_another_process_never_finishes(slow_compiler, tmp_path, monkeypatch):
    library = build_extension(cache_dir=tmp_path)
    library.unlink()
    monkeypatch.setenv("OPTIMUM_SCAP_BUILD_TIMEOUT", "0.2")
    monkeypatch.setattr(build, "LOCK_SECONDS", 0.1)
    monkeypatch.setattr(build, "_compiler_version", lambda compiler: "slow 1.0\n")
    with FileLock(library.with_name("lock")), pytest.raises(ExtensionBuildError) as caught:
        build_extension(cache_dir=tmp_path)
    assert str(library.with_name("lock")) in str(caught.value) and "another process" in str(caught.value)
    assert slow_compiler.read_text() == "run\n"


@pytest.mark.parametrize("seconds", ("soon", "0", "-5", "nan", "inf"))
def test_a_timeout_that_is_no_time(seconds, slow_compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIMUM_SCAP_BUILD_TIMEOUT", seconds)
    with pytest.raises(ExtensionBuildError, match=f"OPTIMUM_SCAP_BUILD_TIMEOUT must be .*, got '{seconds}'"):
        build_extension(cache_dir=tmp_path)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()  # nobody may be left to fetch its status
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_what_a_hanging_compiler_started_ends_with_it(tmp_path, monkeypatch):
    """The driver of a compiler runs others, which hold its pipes open."""
    hanging_compiler(tmp_path, monkeypatch)
    monkeypatch.setenv("OPTIMUM_SCAP_BUILD_TIMEOUT", "5")
    with pytest.raises(ExtensionBuildError, match="did not end within"):
        build_extension(cache_dir=tmp_path / "cache")
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 60
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not list((tmp_path / "cache").glob("*/*/build-*"))


def test_a_disk_that_is_full_when_the_digest_is_written(slow_compiler, tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    monkeypatch.setattr(build, "_digest_file", lambda library: Path("/dev/full"))
    monkeypatch.setattr(build, "_is_intact", lambda library: False)
    with pytest.raises(ExtensionBuildError, match=r"no space left on .*openvino-extension.* \(\d+ MiB free\)"):
        build_extension(cache_dir=tmp_path)
    assert not list(tmp_path.glob("*/*/liboptimum_scap.*"))


@pytest.fixture(scope="module")
def sparse_model():
    return sparsify_activations(gated_ffn(), "up=0.4,gate=0.4,down=0.5", samples())


def broken_compiler(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CXX", "/bin/false")


def no_compiler(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("CXX", raising=False)
    patch.setenv("PATH", str(tmp_path))


def cache_under_a_file(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    """Root may write to any folder, but nobody below a file."""
    (tmp_path / "file").touch()
    patch.setenv("OPTIMUM_SCAP_CACHE", str(tmp_path / "file" / "cache"))


def no_home(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    for name in ("OPTIMUM_SCAP_CACHE", "XDG_CACHE_HOME"):
        patch.delenv(name, raising=False)

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    patch.setattr(Path, "home", home)


def library_that_cannot_be_loaded(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "c++"
    script.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && echo damaged > "$2"; shift; done\n')
    script.chmod(0o755)
    patch.setenv("CXX", str(script))


def script(path: Path, content: bytes) -> str:
    path.write_bytes(b'#!/bin/sh\n[ "$1" = --version ] && exec echo 1.0\n' + content)
    path.chmod(0o755)
    return str(path)


def compiler_that_speaks_latin_1(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CXX", script(tmp_path / "c++", b"printf 'error: \\377 caf\\351\\n' >&2; exit 1\n"))


def compiler_of_an_unknown_version(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c++").write_bytes(b"#!/bin/sh\nprintf 'caf\\351\\n'; printf 'error: nothing works\\n' >&2; exit 7\n")
    (tmp_path / "c++").chmod(0o755)
    patch.setenv("CXX", str(tmp_path / "c++"))


def quote_that_is_not_closed(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CXX", '"g++')


def hanging_compiler(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    hang = f"sleep 600 &\necho $! > {tmp_path / 'child'}\nwait\n"
    patch.setenv("CXX", script(tmp_path / "c++", hang.encode()))
    patch.setenv("OPTIMUM_SCAP_BUILD_TIMEOUT", "2")


def compiler_that_hangs_when_asked_for_its_version(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c++").write_text("#!/bin/sh\nsleep 600\n")
    (tmp_path / "c++").chmod(0o755)
    patch.setenv("CXX", str(tmp_path / "c++"))
    patch.setattr(build, "VERSION_SECONDS", 0.2)


def full_disk(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CXX", script(tmp_path / "c++", b"echo 'collect2: error: ld returned 1 exit status' >&2; exit 1\n"))
    usage = type(shutil.disk_usage(tmp_path))(10 << 20, 9 << 20, 1 << 20)
    patch.setattr(build.shutil, "disk_usage", lambda path: usage)


def full_disk_of_which_the_compiler_speaks(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    said = b"echo '/usr/bin/ld: final link failed: No space left on device' >&2; exit 1\n"
    patch.setenv("CXX", script(tmp_path / "c++", said))


def openvino_without_its_metadata(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    patch.setattr(build.importlib.metadata, "version", version)


OBSTACLES = {
    compiler_that_speaks_latin_1: "failed to build the OpenVINO extension: error: \ufffd caf\ufffd",
    compiler_of_an_unknown_version: "does not run: --version ended with exit status 7",
    quote_that_is_not_closed: "CXX is no command line, '\"g++': No closing quotation",
    hanging_compiler: "did not end within 2 s and was stopped; OPTIMUM_SCAP_BUILD_TIMEOUT says",
    compiler_that_hangs_when_asked_for_its_version: "did not end within 0.2 s",
    full_disk: "(1 MiB free) to build the OpenVINO extension: free some",
    full_disk_of_which_the_compiler_speaks: "MiB free) to build the OpenVINO extension: free some",
    openvino_without_its_metadata: "No package metadata was found for openvino",
    broken_compiler: "/bin/false does not run",
    no_compiler: "no C++ compiler found",
    cache_under_a_file: "cannot build the OpenVINO extension in",
    no_home: "set OPTIMUM_SCAP_CACHE",
    library_that_cannot_be_loaded: "cannot be loaded",
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_cannot_be_built_gives_one_warning_and_the_portable_operations(
    obstacle, sparse_model, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPTIMUM_SCAP_CACHE", str(tmp_path / "cache"))
    obstacle(tmp_path, monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fused_clone(sparse_model) is sparse_model
    (message,) = [str(item.message) for item in caught]
    assert message.startswith("SCAP runs with OpenVINO's own operations") and OBSTACLES[obstacle] in message
    assert "\n" not in message


@pytest.mark.parametrize("obstacle", [name for name in OBSTACLES if name is not library_that_cannot_be_loaded])
def test_the_command_says_in_one_line_what_cannot_be_built(obstacle, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIMUM_SCAP_CACHE", str(tmp_path / "cache"))
    obstacle(tmp_path, monkeypatch)
    result = optimum_cli_in_process("scap", "build-extension")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert OBSTACLES[obstacle] in line and "OPTIMUM_SCAP_TRACEBACK" not in line
