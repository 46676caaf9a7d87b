# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from optimum_scap.openvino.extension import build
from optimum_scap.openvino.extension.build import ExtensionBuildError, build_extension


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


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ExtensionBuildError, match="cannot build"):
        build_extension(cache_dir=tmp_path / "cache")
