# SPDX-License-Identifier: Apache-2.0
"""Compiles the C++ operations against the installed OpenVINO, on first use, into the user's cache.

Nothing is compiled at import. The library's folder is named by everything that shapes it (OpenVINO, sources, compiler,
instruction set, CPU), so an upgrade of any of them builds anew and never loads a stale library. Whatever prevents a
build is an `ExtensionBuildError`: models run without the extension too.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from filelock import FileLock, Timeout

from ...cache import cache_folder
from ...disk import free_bytes, is_disk_full
from ...errors import SCAPError, first_line


SOURCE_DIR = Path(__file__).resolve().parent / "cpp"
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

# Many times what slow machines need: only a compiler that hangs takes as long.
BUILD_SECONDS = 600.0
VERSION_SECONDS = 60.0
MAX_BUILD_SECONDS = 86400.0
# What a process that waits for another one's build grants it on top of the time that a build may take.
LOCK_SECONDS = 30.0
# The compiler's temporary files and the library fit into it several times.
ENOUGH_BYTES = 32 << 20


class ExtensionBuildError(SCAPError):
    """The extension cannot be built or loaded here; the message says why, with what the compiler said."""


def build_extension(isa: str | None = None, cache_dir: str | os.PathLike | None = None) -> Path:
    """Returns the absolute path of the compiled extension, compiling it if it is not in the cache yet.

    Concurrent calls, also from other processes, wait for one build. An interrupted build leaves no library behind, and
    a library that is damaged since is built again. A compiler that takes longer than ``$OPTIMUM_SCAP_BUILD_TIMEOUT``
    seconds (default 600) is stopped.

    Args:
        isa: a key of ``ISA_FLAGS``; default ``$OPTIMUM_SCAP_ISA`` or ``native``.
        cache_dir: default ``$OPTIMUM_SCAP_CACHE`` or the platform's user cache, see ``cache_folder``.

    Raises:
        ExtensionBuildError: no compiler, no OpenVINO headers, an unknown instruction set, a compiler that fails or
            hangs, another process that never finishes its build, or no room in the cache.
    """
    folder = None
    try:
        command, library = _command(isa or os.environ.get("OPTIMUM_SCAP_ISA") or "native")
        folder = Path(os.path.abspath(cache_dir or cache_folder())) / "openvino-extension" / _key(command)
        _build(command, folder / library)
        return folder / library
    except ExtensionBuildError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ExtensionBuildError(_describe(error, folder)) from error


def _build(command: list[str], target: Path) -> None:
    if _is_intact(target):
        return
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    seconds = _build_seconds()
    try:
        with FileLock(folder / "lock", timeout=seconds + LOCK_SECONDS):
            if not _is_intact(target):
                _compile(command, target, seconds)
    except Timeout as error:
        raise ExtensionBuildError(
            f"another process has held {folder / 'lock'} for {seconds + LOCK_SECONDS:.0f} s without finishing its "
            "build of the OpenVINO extension: end that process, or set OPTIMUM_SCAP_CACHE to another folder"
        ) from error


def _build_seconds() -> float:
    named = os.environ.get("OPTIMUM_SCAP_BUILD_TIMEOUT")
    if not named:
        return BUILD_SECONDS
    try:
        seconds = float(named)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_BUILD_SECONDS:
        raise ExtensionBuildError(
            f"OPTIMUM_SCAP_BUILD_TIMEOUT must be a number of seconds up to {MAX_BUILD_SECONDS:.0f}, got {named!r}"
        )
    return seconds


def _describe(error: Exception, folder: Path | None) -> str:
    if folder is None:
        return f"cannot build the OpenVINO extension: {first_line(error)}"
    if is_disk_full(error, folder):
        return _no_space(folder)
    return f"cannot build the OpenVINO extension in {folder}: {first_line(error)}"


def _no_space(folder: Path) -> str:
    return (
        f"no space left on {folder} ({free_bytes(folder) / 2**20:.0f} MiB free) to build the OpenVINO extension: "
        "free some, or set OPTIMUM_SCAP_CACHE to another folder"
    )


@lru_cache
def load_library(library: Path) -> ctypes.CDLL:
    """The compiled extension, for its functions that are no operations.

    Raises:
        ExtensionBuildError: it cannot be loaded, for example from a disk mounted noexec.
    """
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise ExtensionBuildError(f"the extension {library} cannot be loaded: {first_line(error)}") from error


def find_compiler() -> list[str]:
    """The C++ compiler's command: ``$CXX`` (with its flags), or the first of c++, g++, clang++ on the path.

    Raises:
        ExtensionBuildError: there is none, or ``$CXX`` names none.
    """
    if named := os.environ.get("CXX"):
        try:
            command = shlex.split(named)
        except ValueError as error:
            raise ExtensionBuildError(f"CXX is no command line, {named!r}: {error}") from error
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
        if "AuthenticAMD" in _cpu():
            flags = (*flags, "-DSCAP_PREFETCH_TO_L2")
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
    sources = sorted(map(str, SOURCE_DIR.glob("*.cpp")))
    return [*find_compiler(), *BASE_FLAGS, *flags, *kind, f"-I{SOURCE_DIR}", *sources, *openvino_flags()], library


def _key(command: list[str]) -> str:
    digest = hashlib.sha256()
    for part in (*command, importlib.metadata.version("openvino"), _compiler_version(command[0]), _cpu()):
        digest.update(os.fsencode(part) + b"\0")  # a path need not be UTF-8
    for source in sorted([*SOURCE_DIR.glob("*.hpp"), *SOURCE_DIR.glob("*.cpp")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


def _compiler_version(compiler: str) -> str:
    try:
        status, version, _ = _run([compiler, "--version"], min(VERSION_SECONDS, _build_seconds()))
    except OSError as error:
        raise ExtensionBuildError(f"the compiler {compiler} does not run: {first_line(error)}") from error
    if status != 0:
        raise ExtensionBuildError(f"the compiler {compiler} does not run: --version ended with exit status {status}")
    return version


def _run(command: list[str], seconds: float, **environment: str) -> tuple[int, str, str]:
    """Exit status, output and error output of a compiler. If it takes too long it is ended, and all that it started.

    Raises:
        ExtensionBuildError: it took longer than `seconds`.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "LC_ALL": "C", **environment},
        start_new_session=True,  # a group of its own, which can be ended as a whole
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise ExtensionBuildError(
                f"{command[0]} did not end within {seconds:g} s and was stopped; OPTIMUM_SCAP_BUILD_TIMEOUT says how "
                "many seconds a build may take"
            ) from error
    return process.returncode, out, err


def _cpu() -> str:
    """What ``-march=native`` depends on; a cache on a shared disk may be seen by different CPUs."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _is_intact(library: Path) -> bool:
    """Whether the library is there as it was built: loading a truncated one can end the process."""
    try:
        return _digest_file(library).read_bytes() == hashlib.sha256(library.read_bytes()).hexdigest().encode()
    except FileNotFoundError:
        return False


def _digest_file(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _compile(command: list[str], target: Path, seconds: float) -> None:
    # The lock is held: whatever an interrupted build left here is nobody's.
    for stale in target.parent.glob("build-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as folder:
        output = Path(folder) / target.name
        # Its temporary files lie where they are removed, however it ends.
        status, _, said = _run([*command, "-o", str(output)], seconds, TMPDIR=folder)
        if status != 0:
            raise ExtensionBuildError(_compiler_failure(command[0], status, said, target.parent))
        _digest_file(target).write_text(hashlib.sha256(output.read_bytes()).hexdigest())
        os.replace(output, target)


def _compiler_failure(compiler: str, status: int, said: str, folder: Path) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    reasons = [line for line in lines if "error" in line] or lines[-1:] or [f"exit status {status}"]
    reason = f"{compiler} failed to build the OpenVINO extension: {'; '.join(reasons[:5])}"
    if "No space left" in said or "quota exceeded" in said:
        return _no_space(folder)
    # The linker may say "ld returned 1 exit status" and no more.
    return f"{_no_space(folder)}; {reason}" if free_bytes(folder) < ENOUGH_BYTES else reason
