"""The operation with gradients for thresholds, against the formula in its docstring."""

import numpy as np
import pytest
import torch

from optimum_scap.core.criterion import Criterion
from optimum_scap.torch.learned.pruning import WIDTH, Measured, prune_learned


X = torch.tensor([[0.5, 1.2, -2.0, -0.9], [1.05, 0.0, 0.3, 3.0]])
UPSTREAM = torch.tensor([[1.0, 2.0, -1.0, 0.5], [3.0, 1.0, 1.0, -2.0]])


def slope(ratio: np.ndarray) -> np.ndarray:
    sigmoid = 1 / (1 + np.exp(-(ratio - 1) / WIDTH))
    return sigmoid * (1 - sigmoid) / WIDTH


@pytest.mark.parametrize("mode", [0.0, 0.25])
@pytest.mark.parametrize("scale", [None, [1.0, 0.5, 2.0, 1.5]])
@pytest.mark.parametrize("gain", [None, [1.0, 1.1, 0.9, 2.0]])
def test_values_and_gradients(mode: float, scale: list[float] | None, gain: list[float] | None) -> None:
    x = X.clone().requires_grad_()
    threshold = torch.tensor(np.log(0.8), dtype=torch.float32, requires_grad=True)
    gains = None if gain is None else torch.tensor(gain, requires_grad=True)
    scales = None if scale is None else torch.tensor(scale)
    y = prune_learned(x, threshold, mode, scales, gains)
    y.backward(UPSTREAM)

    values, upstream = X.numpy().astype(np.float64), UPSTREAM.numpy().astype(np.float64)
    s, g = np.ones(4) if scale is None else np.array(scale), np.ones(4) if gain is None else np.array(gain)
    criterion = Criterion(np.float32(mode), np.float32(0.8), None if scale is None else s.astype(np.float32))
    pruned = criterion.prunes(X.numpy())
    assert 0 < pruned.sum() < pruned.size
    kept = np.where(pruned, mode, values)
    ratio = s * np.abs(values - mode) / 0.8
    np.testing.assert_allclose(y.detach(), kept * g, rtol=1e-6)
    np.testing.assert_allclose(x.grad, np.where(pruned, 0.0, upstream * g), rtol=1e-6)
    wanted = -(upstream * g * (values - mode) * ratio * slope(ratio)).sum()
    assert float(threshold.grad) == pytest.approx(wanted, rel=1e-5)  # type: ignore[arg-type]
    if gains is not None:
        np.testing.assert_allclose(gains.grad, (upstream * kept).sum(axis=0), rtol=1e-6)


def test_sparsity_and_its_slope() -> None:
    """On many even values the slope is that of the fraction itself: of |x| uniform in [0, 2], t / 2."""
    x = torch.linspace(-2, 2, 40001)[None]
    measured, threshold = Measured(), torch.tensor(0.0, requires_grad=True)
    for _ in range(2):
        prune_learned(x, threshold, 0.0, measured=(measured, "a")).sum().backward()
    prune_learned(torch.tensor([[0.5, 3.0, 4.0, 5.0]]), threshold.detach(), 0.0, measured=(measured, "b"))
    assert measured.sparsities() == {"a": pytest.approx(0.5, abs=1e-3), "b": 0.25}
    assert measured.slopes().keys() == {"a"} and float(measured.slopes()["a"]) == pytest.approx(0.5, abs=5e-3)


def test_nan_is_kept_and_half_precision_stays() -> None:
    x = torch.tensor([[float("nan"), 0.1, 2.0]], dtype=torch.bfloat16)
    y = prune_learned(x, torch.tensor(0.0), 0.0, None, torch.ones(3))
    assert y.dtype == torch.bfloat16 and y[0, 0].isnan() and y[0, 1:].tolist() == [0.0, 2.0]


def test_a_threshold_that_stands_for_zero_prunes_zeros_alone() -> None:
    x = torch.tensor([[0.0, 1e-6, -3.0]], requires_grad=True)
    y = prune_learned(x, torch.tensor(np.log(1e-30), dtype=torch.float32), 0.0)
    y.sum().backward()
    assert torch.equal(y, x) and x.grad.tolist() == [[0.0, 1.0, 1.0]]  # type: ignore[union-attr]
