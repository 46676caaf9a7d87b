"""What is given back must be what a file holds, and nothing else."""

import mmap
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from synthetic import compressed, gated_ffn, samples

from optimum_scap import sparsify_activations
from optimum_scap.openvino.fuse import fuse
from optimum_scap.openvino.inference import EXACT
from optimum_scap.openvino.mapped_files import MappedFiles


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="maps are read from /proc")
SIZE = 64 * mmap.PAGESIZE


def resident_kib(array: np.ndarray) -> int:
    """Of the mapping that `array` begins in."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    for number, line in enumerate(lines):
        addresses = line.split()[0].split("-")
        if len(addresses) == 2 and int(addresses[0], 16) <= array.ctypes.data < int(addresses[1], 16):
            return next(int(entry.split()[1]) for entry in lines[number:] if entry.startswith("Rss:"))
    raise AssertionError("not mapped")


@pytest.fixture
def content() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)


def test_pages_of_a_mapped_file_are_given_back_and_read_again(tmp_path: Path, content: np.ndarray) -> None:
    content.tofile(tmp_path / "model.bin")
    array = np.memmap(tmp_path / "model.bin", mode="r")
    array.sum()
    assert resident_kib(array) == SIZE // 1024
    part = array[mmap.PAGESIZE - 1 : -1]  # of whose pages the first and the last belong to others too
    assert MappedFiles().release(part)
    assert resident_kib(array) == 2 * mmap.PAGESIZE // 1024
    np.testing.assert_array_equal(array, content)
    assert MappedFiles().release(array[:1])  # holds no whole page
    assert resident_kib(array) == SIZE // 1024


@pytest.mark.parametrize(
    ("name", "mode"), [("model.bin", "c"), ("model.bin", "r+"), ("model.safetensors", "r"), (None, None)]
)
def test_other_memory_is_left_alone(name: str | None, mode: str, tmp_path: Path, content: np.ndarray) -> None:
    array = content.copy()
    if name is not None:
        content.tofile(tmp_path / name)
        array = np.memmap(tmp_path / name, mode=mode)
    if mode in ("c", "r+"):
        array[:] = ~content
    before = array.copy()
    assert not MappedFiles().release(array)
    np.testing.assert_array_equal(array, before)


def test_what_is_strided_or_longer_than_the_file_is_left_alone(tmp_path: Path, content: np.ndarray) -> None:
    content.tofile(tmp_path / "model.bin")
    array = np.memmap(tmp_path / "model.bin", mode="r")
    files = MappedFiles()
    assert not files.release(array[::2])
    longer = np.lib.stride_tricks.as_strided(array, (2 * SIZE,), (1,))
    assert not files.release(longer)


@pytest.mark.parametrize("weights", ["f32", "int8_asym", "int4_sym"])
def test_fusing_a_clone_leaves_the_model_that_was_read_as_it_was(weights: str, tmp_path: Path) -> None:
    data = samples()
    made = sparsify_activations(compressed(gated_ffn(), weights), "up=0.4,gate=0.4,down=0.6", data)
    ov.save_model(made, tmp_path / "openvino_model.xml", compress_to_fp16=False)
    read = ov.Core().read_model(tmp_path / "openvino_model.xml")
    expected = ov.Core().compile_model(read, "CPU", EXACT)(data[0])[0].copy()
    clone = read.clone()
    assert len(fuse(clone, precision="f32", dense_int4=True).fused) == 6
    np.testing.assert_array_equal(ov.Core().compile_model(read, "CPU", EXACT)(data[0])[0], expected)
    ov.save_model(read, tmp_path / "again.xml", compress_to_fp16=False)
    again = ov.Core().read_model(tmp_path / "again.xml")
    np.testing.assert_array_equal(ov.Core().compile_model(again, "CPU", EXACT)(data[0])[0], expected)
