"""Integer weights in no layout: what they stand for, and what is refused."""

import pytest
import torch

from optimum_scap.torch.weights.integers import IntegerWeights, check, dequantize


SIGNED = torch.tensor([[-8, 7, 0, 1], [1, -1, 2, -2]], dtype=torch.int8)
UNSIGNED = torch.tensor([[0, 15, 8, 9], [1, 2, 3, 4]], dtype=torch.uint8)
SCALES = torch.tensor([[0.5, 2.0], [1.0, 0.25]], dtype=torch.float16)


def test_symmetric() -> None:
    weights = IntegerWeights(4, SIGNED, SCALES)
    assert weights.group_size == 2
    wanted = torch.tensor([[-4.0, 3.5, 0.0, 2.0], [1.0, -1.0, 0.5, -0.5]])
    assert torch.equal(dequantize(weights, torch.float32), wanted)
    assert dequantize(weights, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_zero_points_are_subtracted_from_integers(dtype: torch.dtype) -> None:
    zero_points = torch.tensor([[8, 9], [0, 16]], dtype=dtype)
    wanted = torch.tensor([[-4.0, 3.5, -2.0, 0.0], [1.0, 2.0, -3.25, -3.0]])
    assert torch.equal(dequantize(IntegerWeights(4, UNSIGNED, SCALES, zero_points), torch.float32), wanted)


def test_offsets_are_added_to_products() -> None:
    offsets = torch.tensor([[-1.0, 0.125], [0.0, 100.0]])
    wanted = torch.tensor([[-1.0, 6.5, 16.125, 18.125], [1.0, 2.0, 100.75, 101.0]])
    assert torch.equal(dequantize(IntegerWeights(8, UNSIGNED, SCALES, offsets), torch.float32), wanted)


def test_results_are_rounded_once() -> None:
    """In float16 the product would be rounded before the offset is added, which differs here."""
    scales, offsets = torch.full((1, 1), 1.0 + 2.0**-10, dtype=torch.float16), torch.full((1, 1), -3.0)
    weights = IntegerWeights(4, torch.tensor([[3]], dtype=torch.uint8), scales, offsets)
    assert dequantize(weights, torch.float16).item() == 3 * 2.0**-10


def test_integers_are_left_as_they_are() -> None:
    weights = IntegerWeights(4, SIGNED.clone(), SCALES.clone())
    dequantize(weights, torch.float16)
    assert torch.equal(weights.integers, SIGNED) and torch.equal(weights.scales, SCALES)


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        (IntegerWeights(3, SIGNED, SCALES), "integers of 3 bits are not supported"),
        (IntegerWeights(4, UNSIGNED, SCALES), "without zero points must be torch.int8"),
        (IntegerWeights(4, SIGNED, SCALES, UNSIGNED[:, :2]), "with zero points or offsets must be torch.uint8"),
        (IntegerWeights(4, SIGNED[0], SCALES), "got torch.int8 of shape \\(4,\\)"),
        (IntegerWeights(4, SIGNED, SCALES.double()), "scales must be floating-point of 16 or 32 bits"),
        (IntegerWeights(4, SIGNED, SCALES[:1]), "of shape \\[2, groups\\], got torch.float16 of shape \\(1, 2\\)"),
        (IntegerWeights(4, SIGNED[:, :3], SCALES), "3 input channels cannot be divided into 2 groups of equal size"),
        (IntegerWeights(4, SIGNED, SCALES[:, :0]), "into 0 groups"),
        (IntegerWeights(4, UNSIGNED, SCALES, SCALES[:, :1]), "the shape of the scales, \\(2, 2\\); got \\(2, 1\\)"),
        (IntegerWeights(4, UNSIGNED, SCALES, SCALES.double()), "got torch.float64"),
    ],
)
def test_what_is_no_integer_weights_is_refused(weights: IntegerWeights, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check(weights)
    with pytest.raises(ValueError, match=complaint):
        dequantize(weights, torch.float32)
