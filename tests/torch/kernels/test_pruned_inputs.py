"""The operation that prunes an input, against its formula element by element."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_problems import DEVICE, DTYPES
from torch import Tensor

from optimum_scap.torch.kernels import launch_pruning, library, reference


IMPLEMENTATIONS = {"twin": reference.prune_input, "triton": launch_pruning.prune_input}
both = pytest.mark.parametrize("name", IMPLEMENTATIONS)


def expected(x: Tensor, threshold: float, mode: float, scale: Tensor | None) -> Tensor:
    """In Python's own numbers; products and differences rounded to float32 as the criterion says."""
    rounded_mode = torch.tensor(mode, dtype=x.dtype).item()

    def value(number: float, factor: float) -> float:
        distance = abs(torch.tensor(number) - torch.tensor(mode)) * torch.tensor(factor)
        return rounded_mode if distance.item() <= threshold else number

    factors = [1.0] * x.shape[-1] if scale is None else scale.tolist()
    rows = [[value(*pair) for pair in zip(row, factors, strict=True)] for row in x.reshape(-1, x.shape[-1]).tolist()]
    return torch.tensor(rows, dtype=x.dtype).reshape(x.shape)


@both
@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 5),
    features=st.sampled_from([1, 7, 64, 1023, 1025]),
    dtype=st.sampled_from(DTYPES),
    threshold=st.sampled_from([0.0, 0.5, math.inf]),
    mode=st.sampled_from([0.0, 0.3, -1.1]),
    scaled=st.booleans(),
)
def test_the_formula(
    name: str, rows: int, features: int, dtype: torch.dtype, threshold: float, mode: float, scaled: bool
) -> None:
    generator = torch.Generator().manual_seed(rows * features)
    x = torch.randn(rows, features, generator=generator).to(dtype)
    scale = torch.rand(features, generator=generator) * 2 if scaled else None
    result = IMPLEMENTATIONS[name](x.to(DEVICE), threshold, mode, None if scale is None else scale.to(DEVICE))
    assert result.dtype == dtype
    assert torch.equal(result.cpu(), expected(x, threshold, mode, scale))


@both
def test_values_at_the_threshold_are_pruned_and_nan_is_kept(name: str) -> None:
    x = torch.tensor([[0.5, -0.5, 0.5000001, math.nan, math.inf, -math.inf, 0.0]], device=DEVICE)
    result = IMPLEMENTATIONS[name](x, 0.5, 0.0, None).tolist()[0]
    assert result[:2] == [0.0, 0.0] and result[2] > 0.5 and math.isnan(result[3])
    assert result[4:] == [math.inf, -math.inf, 0.0]


@both
def test_inputs_that_are_no_rows_in_memory(name: str) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    result = IMPLEMENTATIONS[name](x.t(), 0.7, 0.25, None)
    assert torch.equal(result.cpu(), expected(x.t().cpu(), 0.7, 0.25, None)) and result.is_contiguous()
    for shape in [(0, 5), (2, 0, 5)]:
        assert IMPLEMENTATIONS[name](torch.empty(shape, device=DEVICE), 0.5, 0.0, None).shape == shape


@both
def test_a_scale_of_another_shape_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a scale must be contiguous float32 of shape"):
        IMPLEMENTATIONS[name](torch.ones(2, 4, device=DEVICE), 0.5, 0.0, torch.ones(5, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operation(dtype: torch.dtype) -> None:
    x = torch.randn(3, 2, 48, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    torch.library.opcheck(library.prune_input, (x, 0.7, 0.1, torch.rand(48, device=DEVICE)))
    torch.library.opcheck(library.prune_input, (x.transpose(0, 1), 0.7, 0.1, None))
    compiled = torch.compile(lambda x: library.prune_input(x * 2, 0.7, 0.1, None), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), reference.prune_input(x * 2, 0.7, 0.1, None))
