"""INT4 and INT8 weights as the kernels read them: nothing is lost, and what they stand for stays the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integer_problems import KINDS, in_float64, random_integers

from optimum_scap.torch.weights import IntegerWeights, find_format, packed
from optimum_scap.torch.weights.integers import dequantize


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def integer_weights(draw) -> IntegerWeights:
    group_size = draw(st.sampled_from([1, 3, 8, 32, 64, 128]))
    in_features = group_size * draw(st.integers(1, max(1, 200 // group_size)))
    return random_integers(
        torch.Generator().manual_seed(draw(st.integers(0, 99))),
        draw(st.sampled_from([4, 8])),
        draw(st.integers(1, 150)),
        in_features,
        draw(st.sampled_from([group_size, in_features])),
        draw(st.sampled_from(KINDS)),
        draw(st.sampled_from(DTYPES)),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(weights=integer_weights())
def test_packing_loses_nothing(weights: IntegerWeights) -> None:
    weight_format = find_format(f"int{weights.bits}")
    name, tensors = weight_format.pack(weights)
    assert (name, len(tensors)) == (weight_format.name, weight_format.tensor_count)
    assert weight_format.shape(tensors) == tuple(weights.integers.shape)
    again = weight_format.unpack(tensors)
    assert again.bits == weights.bits
    for mine, given_one in zip(again[1:], weights[1:], strict=True):
        assert (mine is None) == (given_one is None)
        if mine is not None:
            assert mine.dtype == given_one.dtype and mine.is_contiguous() and torch.equal(mine, given_one)
    for dtype in DTYPES:
        assert torch.equal(weight_format.dequantize(tensors, dtype), dequantize(weights, dtype))
    assert torch.equal(weight_format.dequantize(tensors), dequantize(weights, torch.float32))
    torch.testing.assert_close(dequantize(weights, torch.float32).double(), in_float64(weights), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_and_products_go_by_blocks(bits: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "BYTES_PER_BLOCK", 0)
    monkeypatch.setattr(packed, "COLUMNS_PER_BLOCK", 64)
    generator = torch.Generator().manual_seed(0)
    weights = random_integers(generator, bits, 300, 96, 32, kind, torch.float32)
    weight_format = find_format(f"int{bits}")
    tensors = [tensor.to(DEVICE) for tensor in weight_format.pack(weights).tensors]
    assert len(list(weight_format.blocks(tensors, torch.float32))) > 2
    wanted = in_float64(weights).to(DEVICE)
    sums = weight_format.row_sums(tensors)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), wanted.sum(dim=1), rtol=1e-5, atol=1e-6)
    bias = torch.randn(300, generator=generator).to(DEVICE)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        x = torch.randn(2, 9, 96, generator=generator).to(DEVICE, dtype)
        product = x.double() @ wanted.t()
        for b in (None, bias):
            y = weight_format.multiply(x, tensors, b)
            assert y.dtype == dtype and y.shape == (2, 9, 300)
            total = product if b is None else product + b.double()
            torch.testing.assert_close(y.double(), total, rtol=tolerance, atol=tolerance)


def test_products_have_gradients() -> None:
    weights = random_integers(torch.Generator().manual_seed(1), 4, 20, 32, 16)
    tensors = [tensor.to(DEVICE) for tensor in find_format("int4").pack(weights).tensors]
    x = torch.ones(10, 32, device=DEVICE, requires_grad=True)
    find_format("int4").multiply(x, tensors).sum().backward()
    torch.testing.assert_close(x.grad[0].double(), in_float64(weights).sum(dim=0).to(DEVICE), rtol=1e-4, atol=1e-5)


def test_four_bits_take_half_a_byte() -> None:
    weights = random_integers(torch.Generator().manual_seed(2), 4, 128, 256, 128)
    tensors = find_format("int4").pack(weights).tensors
    assert sum(tensor.nbytes for tensor in tensors) == 128 * 256 // 2 + 2 * 128 * 2


def test_kernels_are_told_what_weights_are_like() -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = find_format("int4").pack(random_integers(generator, 4, 70, 96, 32)).tensors
    arguments = find_format("int4").kernel_arguments(tensors, input_major=True)
    assert (arguments.bits, arguments.group_size, arguments.strides) == (4, 32, (2,))
    with_zero_points = find_format("int4").pack(random_integers(generator, 4, 70, 96, 32, "zero points")).tensors
    other = find_format("int4").kernel_arguments(with_zero_points, input_major=True)
    assert other.kind != arguments.kind and len(other.tensors) == 3
    with pytest.raises(ValueError, match="int4 weights must be contiguous"):
        find_format("int4").kernel_arguments((tensors[0][:, 8:], *tensors[1:]), input_major=True)


@pytest.mark.parametrize(
    ("name", "weights", "complaint"),
    [
        ("int4", IntegerWeights(8, torch.zeros(2, 2, dtype=torch.int8), torch.ones(2, 1)), "got integers of 8 bits"),
        (
            "int4",
            IntegerWeights(4, torch.full((2, 2), 8, dtype=torch.int8), torch.ones(2, 1)),
            "integers must be from -8 to 7, got some from 8 to 8",
        ),
        (
            "int4",
            IntegerWeights(
                4, torch.full((2, 2), 16, dtype=torch.uint8), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32)
            ),
            "integers must be from 0 to 15, got some from 16 to 16",
        ),
        (
            "int8",
            IntegerWeights(
                8, torch.zeros(2, 2, dtype=torch.uint8), torch.ones(2, 1), torch.full((2, 1), -1, dtype=torch.int32)
            ),
            "zero points must be from 0 to 255, got some from -1 to -1",
        ),
        ("int8", IntegerWeights(8, torch.zeros(2, 3, dtype=torch.int8), torch.ones(2, 2)), "cannot be divided into 2"),
    ],
)
def test_what_cannot_be_packed_is_refused(name: str, weights: IntegerWeights, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        find_format(name).pack(weights)
