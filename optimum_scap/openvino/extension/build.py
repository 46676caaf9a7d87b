# SPDX-License-Identifier: Apache-2.0
"""Compiles the C++ operations against the installed OpenVINO, on first use, into the user's cache.

Nothing is compiled at import. The library's folder is named by everything that shapes it (OpenVINO, sources, compiler,
instruction set, CPU), so an upgrade of any of them builds anew and never loads a stale library.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from ...errors import SCAPError


SOURCE_DIR = Path(__file__).parent
BASE_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden")

# Instruction sets that can be asked for: compiler flags on x86. Elsewhere only native and portable exist.
ISA_FLAGS = {
    "native": ("-march=native",),
    "amx": ("-march=sapphirerapids",),
    "avx512vnni": ("-march=icelake-server",),
    "avx512": ("-march=skylake-avx512",),
    "avx2vnni": ("-march=haswell", "-mavxvnni"),
    "avx2": ("-march=haswell",),
    "portable": ("-march=x86-64",),
}


class ExtensionBuildError(SCAPError):
    """The extension cannot be built or loaded here; the message says why, with what the compiler said."""


def build_extension(isa: str | None = None, cache_dir: str | os.PathLike | None = None) -> Path:
    """Returns the path of the compiled extension, compiling it if it is not in the cache yet.

    Concurrent calls, also from other processes, wait for one build. An interrupted build leaves no library behind, and
    a library that is damaged since is built again.

    Args:
        isa: a key of ``ISA_FLAGS``; default ``$OPTIMUM_SCAP_ISA`` or ``native``.
        cache_dir: default ``$OPTIMUM_SCAP_CACHE`` or the platform's user cache.

    Raises:
        ExtensionBuildError: no compiler, no OpenVINO headers, an unknown instruction set, or a compiler error.
    """
    command, library = _command(isa or os.environ.get("OPTIMUM_SCAP_ISA") or "native")
    folder = Path(cache_dir or default_cache_dir()) / "openvino-extension" / _key(command)
    target = folder / library
    try:
        if _is_intact(target):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not _is_intact(target):
                _compile(command, target)
    except OSError as error:
        raise ExtensionBuildError(f"cannot build the OpenVINO extension in {folder}: {error}") from error
    return target


def default_cache_dir() -> Path:
    """``$OPTIMUM_SCAP_CACHE``, or ``optimum_scap`` in the platform's user cache.

    Raises:
        ExtensionBuildError: the user has no home folder.
    """
    if override := os.environ.get("OPTIMUM_SCAP_CACHE"):
        return Path(override)
    try:
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # containers run as users that no file lists
        raise ExtensionBuildError(f"{error} Set OPTIMUM_SCAP_CACHE to a folder for the extension.") from error
    return base / "optimum_scap"


def find_compiler() -> list[str]:
    """The C++ compiler's command: ``$CXX`` (with its flags), or the first of c++, g++, clang++ on the path.

    Raises:
        ExtensionBuildError: there is none.
    """
    if named := os.environ.get("CXX"):
        command = shlex.split(named)
        if command and shutil.which(command[0]):
            return command
        raise ExtensionBuildError(f"the compiler named by CXX, {named!r}, was not found")
    for name in ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return [path]
    raise ExtensionBuildError("no C++ compiler found: install g++ or clang++, or set CXX")


def openvino_flags() -> list[str]:
    """Compiler flags to build and link against the installed OpenVINO and its oneTBB.

    Raises:
        ExtensionBuildError: OpenVINO is missing, or was installed without headers and libraries.
    """
    spec = importlib.util.find_spec("openvino")
    if spec is None or not spec.submodule_search_locations:
        raise ExtensionBuildError("OpenVINO is not installed")
    root = Path(spec.submodule_search_locations[0])
    include, libs = root / "include", root / "libs"
    if not (include / "openvino" / "op" / "op.hpp").exists() or not (include / "tbb" / "parallel_for.h").exists():
        raise ExtensionBuildError(f"no OpenVINO and oneTBB headers in {include}: install OpenVINO from PyPI")
    suffix = "*.dylib" if sys.platform == "darwin" else ".so*"
    linked = []
    for name in ("libopenvino", "libtbb"):
        found = sorted(p for p in libs.glob(name + suffix) if p.name[len(name)] == ".")
        if not found:
            raise ExtensionBuildError(f"no {name} in {libs}")
        linked.append(str(found[0]))
    return [f"-I{include}", *linked, f"-Wl,-rpath,{libs}"]


def _command(isa: str) -> tuple[list[str], str]:
    """The compiler command without its output, and the library's file name."""
    if isa not in ISA_FLAGS:
        raise ExtensionBuildError(f"unknown instruction set {isa!r}, choose from {', '.join(ISA_FLAGS)}")
    if sys.platform == "win32":
        raise ExtensionBuildError("the OpenVINO extension cannot be built on Windows yet")
    if platform.machine().lower() in ("x86_64", "amd64"):
        flags: tuple[str, ...] = ISA_FLAGS[isa]
    elif isa in ("native", "portable"):
        flags = ("-mcpu=native",) if isa == "native" else ()
    else:
        raise ExtensionBuildError(f"instruction set {isa!r} does not exist on {platform.machine()}")
    # A process that ends with a model alive may unload the extension first, and then destroy operations whose code is
    # gone: the library stays in memory.
    kind, library = (
        (("-dynamiclib",), "liboptimum_scap.dylib")
        if sys.platform == "darwin"
        else (("-shared", "-Wl,-z,nodelete"), "liboptimum_scap.so")
    )
    sources = [str(SOURCE_DIR / name) for name in ("op.cpp", "linear.cpp", "pack.cpp")]
    return [*find_compiler(), *BASE_FLAGS, *flags, *kind, f"-I{SOURCE_DIR}", *sources, *openvino_flags()], library


def _key(command: list[str]) -> str:
    digest = hashlib.sha256()
    for part in (*command, importlib.metadata.version("openvino"), _compiler_version(command[0]), _cpu()):
        digest.update(part.encode() + b"\0")
    for source in sorted([*SOURCE_DIR.glob("*.hpp"), *SOURCE_DIR.glob("*.cpp")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


def _compiler_version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ExtensionBuildError(f"the compiler {compiler} does not run: {error}") from error


def _cpu() -> str:
    """What ``-march=native`` depends on; a cache on a shared disk may be seen by different CPUs."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _is_intact(library: Path) -> bool:
    """Whether the library is there as it was built: loading a truncated one can end the process."""
    try:
        return _digest_file(library).read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except FileNotFoundError:
        return False


def _digest_file(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _compile(command: list[str], target: Path) -> None:
    # The lock is held: whatever an interrupted build left here is nobody's.
    for stale in target.parent.glob("build-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
        output = Path(folder) / target.name
        result = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
        if result.returncode != 0:
            lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()[-1:]
            raise ExtensionBuildError(f"{command[0]} failed to build the OpenVINO extension: {'; '.join(lines[:5])}")
        _digest_file(target).write_text(hashlib.sha256(output.read_bytes()).hexdigest())
        os.replace(output, target)
