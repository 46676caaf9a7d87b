# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from optimum_scap.openvino.extension.packing import (
    CACHE_LINE_BYTES,
    HUGE_PAGE_BYTES,
    POOL_BYTES,
    BufferPool,
    pack_float,
    pack_integer,
    unpack_nibbles,
)


def test_rows_are_input_channels():
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    packed = pack_float(weight, np.array([7, 8], np.float32))
    rows = packed.buffer[: 3 * 32 * 4].view(np.float32).reshape(3, 32)
    np.testing.assert_array_equal(rows[:, :2], weight.T)
    assert not rows[:, 2:].any()
    np.testing.assert_array_equal(packed.buffer[384:392].view(np.float32), [7, 8])
    assert packed.buffer.size == 384 + 64 + 512


def test_nibbles_of_32_columns_share_16_bytes():
    q = np.arange(-8, 8, dtype=np.int8).repeat(2)[:, None]
    packed = pack_integer(q, np.ones((32, 1), np.float32), bits=4, signed=True)
    assert (packed.weight_type, packed.zero_point, packed.scale_type) == ("u4", 8, "f16")
    low, high = packed.buffer[:16] & 15, packed.buffer[:16] >> 4
    np.testing.assert_array_equal(np.concatenate([low, high]), q[:, 0] + 8)


def test_equal_zero_points_need_no_room():
    q = np.zeros((4, 6), np.uint8)
    scale = np.full((4, 2), 0.1, np.float32)
    same = pack_integer(q, scale, np.full((4, 2), 3, np.uint8), bits=8, signed=False, group_size=3)
    other = pack_integer(q, scale, np.arange(8, dtype=np.uint8).reshape(4, 2), bits=8, signed=False, group_size=3)
    assert (same.zero_point, other.zero_point, same.scale_type) == (3, -1, "f32")
    assert other.buffer.size > same.buffer.size


def test_unpack_nibbles():
    np.testing.assert_array_equal(unpack_nibbles(np.array([0x21, 0x43], np.uint8), 3), [1, 2, 3])


def rows_of(values: np.ndarray, bits: int) -> np.ndarray:
    """The rows of a buffer in plain numpy, from unsigned or float values ``[out, in]``: bytes ``[in, row bytes]``."""
    out_features, in_features = values.shape
    padded = np.zeros((in_features, -(-out_features // 32) * 32), values.dtype)
    padded[:, :out_features] = values.T
    if bits == 4:
        halves = padded.reshape(in_features, -1, 2, 16)
        padded = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(in_features, -1)
    rows = padded.view(np.uint8)
    return np.pad(rows, ((0, 0), (0, 64))) if rows.shape[1] % 1024 == 0 else rows


def assert_rows(buffer: np.ndarray, values: np.ndarray, bits: int) -> None:
    expected = rows_of(values, bits)
    np.testing.assert_array_equal(buffer[: expected.size].reshape(expected.shape), expected)


SHAPES = ((1, 2), (3, 64), (17, 130), (64, 64), (200, 258), (2048, 70), (5, 7))


@pytest.mark.parametrize("signed", (True, False))
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_the_library_packs_as_numpy_does(out_features, in_features, signed):
    rng = np.random.default_rng(out_features)
    scale = rng.random((out_features, 1)).astype(np.float16)
    unsigned = rng.integers(0, 256, (out_features, in_features)).astype(np.uint8)
    nibbles = unsigned & 15
    q = (unsigned ^ 0x80).view(np.int8) if signed else unsigned
    q4 = nibbles.astype(np.int8) - 8 if signed else nibbles
    # As stored, transposed, and neither.
    for order in (np.ascontiguousarray, np.asfortranarray, lambda values: values.repeat(2, axis=1)[:, ::2]):
        for wide in (q, q.astype(np.int64)):
            assert_rows(pack_integer(order(wide), scale, bits=8, signed=signed).buffer, unsigned, 8)
        assert_rows(pack_integer(order(q4), scale, bits=4, signed=signed).buffer, nibbles, 4)
        for dtype in (np.float32, np.float16):
            weight = order(rng.standard_normal((out_features, in_features)).astype(dtype))
            assert_rows(pack_float(weight).buffer, weight, 32)
    if in_features % 2 == 0:
        stored = (q4[:, ::2] & 15 | q4[:, 1::2] << 4).view(np.uint8)
        pairs = pack_integer(stored, scale, bits=4, signed=signed, nibbles=True)
        assert pairs.in_features == in_features
        np.testing.assert_array_equal(pairs.buffer, pack_integer(q4, scale, bits=4, signed=signed).buffer)


def test_the_library_says_where_parts_lie():
    rng = np.random.default_rng(0)
    scale = rng.random((40, 3)).astype(np.float32)
    zero_point, bias = np.arange(120, dtype=np.uint8).reshape(40, 3), rng.random(40).astype(np.float32)
    q = np.zeros((40, 70), np.uint8)
    buffer = pack_integer(q, scale, zero_point, bias, bits=8, signed=False, group_size=32).buffer
    rows, scales, zeros = 70 * 64, 3 * 64 * 4, 3 * 64  # 40 output channels are padded to 64
    assert buffer.size == rows + scales + zeros + 192 + 512
    np.testing.assert_array_equal(buffer[rows:][:scales].view(np.float32).reshape(3, 64)[:, :40], scale.T)
    np.testing.assert_array_equal(buffer[rows + scales :][:zeros].reshape(3, 64)[:, :40], zero_point.T)
    np.testing.assert_array_equal(buffer[rows + scales + zeros :][:160].view(np.float32), bias)
    assert not buffer[rows + scales + zeros + 160 :].any()


def test_weights_that_are_not_aligned():
    weight = np.frombuffer(bytes(range(1, 26)), np.uint8)[1:].view(np.float32).reshape(2, 3)
    assert not weight.flags.aligned
    assert_rows(pack_float(weight).buffer, weight, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "bits"),
        ({"group_size": -1}, "group_size"),
        ({"group_size": 2}, "scale must be"),
        ({"scale": np.ones((4, 1), np.float64)}, "scale must be"),
        ({"zero_point": np.zeros((1, 1), np.int8)}, "zero_point must be"),
        ({"zero_point": np.full((4, 1), 9, np.int8)}, r"zero_point must be integers in \[-8, 7\]"),
        ({"q": np.full((4, 6), 8, np.int8)}, "q must be integers"),
        ({"q": np.zeros((4, 0), np.int8)}, "q must be integers"),
        ({"bias": np.zeros(3, np.float32)}, "bias must be"),
        ({"nibbles": True}, "nibbles are uint8"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {"q": np.zeros((4, 6), np.int8), "scale": np.ones((4, 1), np.float32), "bits": 4, "signed": True}
    with pytest.raises(ValueError, match=message):
        pack_integer(**(arguments | changes))


def test_float_weights_of_another_type_are_refused():
    with pytest.raises(ValueError, match="weight must be"):
        pack_float(np.zeros((2, 2), np.float64))


def test_buffers_of_a_pool_lie_apart_and_outlive_it():
    pool = BufferPool()
    sizes = [1, 63, 64, 65, POOL_BYTES - 256, POOL_BYTES, 3 * HUGE_PAGE_BYTES, POOL_BYTES + 1, 17]
    buffers = [pool.take(size) for size in sizes]
    del pool
    for buffer, size in zip(buffers, sizes, strict=True):
        assert buffer.size == size and buffer.ctypes.data % CACHE_LINE_BYTES == 0
    starts = sorted((buffer.ctypes.data, buffer.size) for buffer in buffers)
    assert all(at + size <= after for (at, size), (after, _) in zip(starts, starts[1:], strict=False))
    assert buffers[0].ctypes.data % HUGE_PAGE_BYTES == 0
    assert buffers[1].ctypes.data - buffers[0].ctypes.data == CACHE_LINE_BYTES  # one behind the other
    for number, buffer in enumerate(buffers):
        buffer[0] = buffer[-1] = number
    assert [(buffer[0], buffer[-1]) for buffer in buffers] == [(n, n) for n in range(len(sizes))]


def test_a_pool_changes_nothing_in_a_buffer():
    weight = np.random.default_rng(0).standard_normal((33, 17)).astype(np.float32)
    pool = BufferPool()
    pool.take(5)
    np.testing.assert_array_equal(pack_float(weight, pool=pool).buffer, pack_float(weight).buffer)
