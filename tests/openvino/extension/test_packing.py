# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from optimum_scap.openvino.extension.packing import TAIL_BYTES, pack_float, pack_integer, unpack_nibbles


def test_rows_are_input_channels():
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    packed = pack_float(weight, np.array([7, 8], np.float32))
    rows = packed.buffer[: 3 * 32 * 4].view(np.float32).reshape(3, 32)
    np.testing.assert_array_equal(rows[:, :2], weight.T)
    assert not rows[:, 2:].any()
    np.testing.assert_array_equal(packed.buffer[384:392].view(np.float32), [7, 8])
    assert packed.buffer.size == 384 + 64 + TAIL_BYTES


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
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {"q": np.zeros((4, 6), np.int8), "scale": np.ones((4, 1), np.float32), "bits": 4, "signed": True}
    with pytest.raises(ValueError, match=message):
        pack_integer(**(arguments | changes))


def test_float_weights_of_another_type_are_refused():
    with pytest.raises(ValueError, match="weight must be"):
        pack_float(np.zeros((2, 2), np.float64))
