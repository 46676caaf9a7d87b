"""The sketch on torch tensors against exact numpy answers."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from optimum_scap import SCAPError
from optimum_scap.core.statistics import ActivationStatistics
from optimum_scap.torch.statistics import TorchActivationStatistics, TorchQuantileSketch


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def stream(kind: str, batches: int, seed: int = 0) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(2 * torch.randn(512, generator=generator))  # outlier channels, as real activations have
    for _ in range(batches):
        x = torch.randn(1024, 512, generator=generator)
        six_orders = x.sign() * 10 ** (6 * torch.rand(x.shape, generator=generator) - 3)
        yield {"normal": x, "outlier channels": x * scale, "six orders": six_orders}[kind]


@pytest.mark.parametrize("kind", ["normal", "outlier channels", "six orders"])
def test_quantiles_of_a_stream_that_is_thinned_out(kind: str) -> None:
    statistics = TorchActivationStatistics("layer")
    values = []
    for batch in stream(kind, 40):  # 21 million values, five times what is sorted whole
        statistics.add(batch.to(DEVICE))
        values.append(batch.reshape(-1).numpy())
    everything = np.concatenate(values)
    for method in ("zero", "median"):
        for sparsity in (0.05, 0.35, 0.55, 0.9, 0.99):
            criterion = statistics.solve(method, sparsity)
            mode, threshold = criterion.mode, criterion.threshold
            realized = np.mean(np.abs(everything - mode) <= threshold)
            assert realized == pytest.approx(sparsity, abs=0.002)
    assert np.mean(everything <= statistics.solve("median", 0.5).mode) == pytest.approx(0.5, abs=0.002)
    assert statistics.solve("mean", 0.5).mode == pytest.approx(everything.mean(), abs=1e-3 * float(everything.std()))


def test_memory_stays_bounded_and_weights_exact() -> None:
    sketch = TorchQuantileSketch()
    count = 0
    for batch in stream("normal", 40):
        odd = batch.reshape(-1)[:500_001]
        sketch.add(odd.to(DEVICE))
        count += odd.numel()
    values, weights = sketch.weighted_values()
    assert weights.sum() == pytest.approx(count, rel=1e-4) and sketch.count == count
    assert values.size < 200_000 and np.all(np.diff(values) >= 0)
    chunks = [chunk for level in sketch._levels for chunk in level]
    assert sum(chunk.untyped_storage().nbytes() for chunk in chunks) == 4 * values.size


def test_the_same_answers_as_on_the_host_while_the_stream_is_short() -> None:
    torch_statistics, numpy_statistics = TorchActivationStatistics("layer"), ActivationStatistics("layer")
    for batch in stream("outlier channels", 4):
        torch_statistics.add(batch.to(DEVICE))
        numpy_statistics.add(batch.numpy())
    for method in ("zero", "median", "kde"):
        assert torch_statistics.solve(method, 0.4).key == numpy_statistics.solve(method, 0.4).key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_thresholds_themselves(dtype: torch.dtype) -> None:
    statistics = TorchActivationStatistics("layer")
    x = torch.randn(256, 512).to(dtype)
    statistics.add(x.to(DEVICE))
    threshold = statistics.solve("zero", 0.5).threshold
    assert (x.float().abs() == float(threshold)).any()
    assert float((x.float().abs() <= float(threshold)).float().mean()) == pytest.approx(0.5, abs=0.004)


def test_constant_zero_nan_and_empty() -> None:
    statistics = TorchActivationStatistics("layer")
    statistics.add(torch.full((4, 8), 3.0, device=DEVICE))
    assert statistics.solve("median", 0.5).key == (3.0, 0.0, None)
    for values, message in (
        (torch.zeros(4, 8), "layer bad: all of its input activations are zero"),
        (torch.tensor([1.0, float("nan")]), "layer bad: .*NaN or infinite"),
        (torch.tensor([1.0, -float("inf")]), "layer bad: .*NaN or infinite"),
        (torch.zeros(0, 8), "layer bad: no activations were seen"),
    ):
        bad = TorchActivationStatistics("bad")
        bad.add(values.to(DEVICE))
        with pytest.raises(SCAPError, match=message):
            bad.solve("zero", 0.5)


def test_the_same_seed_gives_the_same_thresholds() -> None:
    answers = []
    for _ in range(2):
        statistics = TorchActivationStatistics("layer", seed=7)
        for batch in stream("normal", 20):
            statistics.add(batch.to(DEVICE))
        answers.append(statistics.solve("median", 0.5).key)
    assert answers[0] == answers[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="synchronization is a matter of GPUs")
def test_no_synchronization_while_statistics_are_collected() -> None:
    batches = [batch.to(DEVICE) for batch in stream("normal", 20)]
    statistics = TorchActivationStatistics("layer")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            statistics.add(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert statistics.solve("zero", 0.5).threshold > 0
