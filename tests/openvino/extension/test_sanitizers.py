# SPDX-License-Identifier: Apache-2.0
"""The C++ code under the sanitizers: wrong results, out-of-bounds access, undefined behavior, data races.

Each build compiles it once more: the kernels without OpenVINO, the operations with it. OpenVINO itself is not
instrumented.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from optimum_scap.openvino.extension.build import BASE_FLAGS, ISA_FLAGS, SOURCE_DIR, find_compiler, openvino_flags


HERE = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")


def run_driver(
    name: str,
    sources: tuple[str, ...],
    flags: tuple[str, ...],
    tmp_path: Path,
    compiler: tuple[str, ...] = (),
    emulator: tuple[str, ...] = (),
) -> None:
    program = tmp_path / name
    command = [
        *(compiler or find_compiler()), *BASE_FLAGS, "-pthread", f"-I{HERE / 'std_tbb'}", f"-I{SOURCE_DIR}",
        HERE / f"{name}.cpp", *(SOURCE_DIR / source for source in sources), "-o", program, *flags,
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip(f"the compiler has no library for {flags}")
    assert built.returncode == 0, built.stderr
    result = subprocess.run([*emulator, program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def run_kernels(tmp_path: Path, flags: tuple[str, ...]) -> None:
    run_driver("kernels_driver", ("linear.cpp",), flags, tmp_path)


# One of them here: builds with sanitizers run for half a minute each.
SANITIZERS = ("address,undefined", pytest.param("thread", marks=pytest.mark.slow))
ISAS = ("native", *(pytest.param(isa, marks=pytest.mark.slow) for isa in ("avx2", "portable")))


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_are_clean(sanitizer, isa, tmp_path):
    if isa not in ("native", "portable") and not X86:
        pytest.skip("an x86 instruction set")
    flags = ISA_FLAGS[isa] if X86 else ()
    run_kernels(tmp_path, (*flags, "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"))


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_operations_are_clean(sanitizer, tmp_path):
    flags = ("-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", *openvino_flags())
    run_driver("op_driver", ("op.cpp", "op_attributes.cpp", "linear.cpp"), flags, tmp_path)


def test_tiles_that_the_system_refuses(tmp_path):
    """The kernels built for AMX where the permission is not given, which every CPU can play through."""
    if not X86 or "avx512_vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the AMX build needs AVX-512 VNNI")
    tiles = ("-march=native", "-mamx-tile", "-mamx-int8", "-mamx-bf16")
    run_kernels(tmp_path, (*tiles, "-O1", "-DREFUSE_TILES", "-Wl,--wrap=syscall"))


@pytest.mark.parametrize("flags", ((), ("-march=armv8.2-a+fp16+dotprod",)), ids=("armv8", "armv8.2"))
def test_kernels_are_right_on_aarch64(flags, tmp_path):
    """Cross-compiled and emulated: Debian's packages g++-aarch64-linux-gnu and qemu-user."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    run_driver("kernels_driver", ("linear.cpp",), ("-static", *flags), tmp_path, (compiler,), (emulator,))
