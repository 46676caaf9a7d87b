"""The dense format, and the registry of formats."""

import pytest
import torch

from optimum_scap.torch.weights import Weights, find_format


def test_dense_weights_stay_what_they_are_in_another_order() -> None:
    weight = torch.arange(15, dtype=torch.float16).view(5, 3)
    dense = find_format("dense")
    name, tensors = dense.pack(weight)
    assert (name, len(tensors)) == ("dense", dense.tensor_count)
    assert tensors[0].stride() == (1, 5)
    assert dense.shape(tensors) == (5, 3)
    assert torch.equal(dense.dequantize(tensors), weight)
    assert (
        torch.equal(dense.row_sums(tensors), weight.float().sum(1)) and dense.row_sums(tensors).dtype == torch.float32
    )
    x, bias = torch.ones(2, 3, dtype=torch.float16), torch.ones(5, dtype=torch.float16)
    assert torch.equal(dense.multiply(x, tensors, bias), (weight.sum(1) + 1).expand(2, 5))


def test_sums_of_half_precision_weights_are_made_in_float32() -> None:
    weight = torch.full((1, 10_000), 1.0, dtype=torch.bfloat16)
    assert find_format("dense").row_sums((weight,)).tolist() == [10_000.0]


def test_kernels_are_told_how_dense_weights_lie() -> None:
    dense = find_format("dense")
    weight = torch.zeros(6, 4, dtype=torch.float16)
    assert dense.kernel_arguments((weight,), input_major=False)[1:] == ((4,), (False,), 1, 1, None)
    packed = dense.pack(weight).tensors
    assert dense.kernel_arguments(packed, input_major=True)[1:] == ((6,), (True,), 1, 1, None)
    assert dense.kernel_arguments(packed, input_major=True).bits == 16
    with pytest.raises(ValueError, match="input-channel-major, with strides \\(1, >= 6\\); got \\(4, 1\\)"):
        dense.kernel_arguments((weight,), input_major=True)
    with pytest.raises(ValueError, match="output-channel-major, with strides \\(>= 4, 1\\); got \\(1, 6\\)"):
        dense.kernel_arguments(packed, input_major=False)


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown weight format 'int3', choose from dense, int4, int8"):
        find_format("int3")


def test_layers_of_a_group_share_their_format() -> None:
    from optimum_scap.torch.kernels import linear_group

    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="must be of one weight format, got dense, int3"):
        linear_group(x, [torch.zeros(3, 2), Weights("int3", (torch.zeros(3, 2),))], [None, None])
