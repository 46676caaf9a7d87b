"""When learning stops before its last step."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from optimum_scap import SCAPConfig
from optimum_scap.torch.learned.training import Training, _Best


class Scripted(Training):
    """Takes steps that do nothing, and sees the losses that it is given."""

    def __init__(self, losses: list[float], steps: int) -> None:
        self.value = torch.zeros(3, requires_grad=True)
        layers: Any = SimpleNamespace(learned_tensors=lambda: {"biases": [self.value]}, result=lambda: self.value)
        objective: Any = SimpleNamespace(tokens_at_once=64, dense=lambda ids: ids)
        config = SCAPConfig.from_spec("0.5", learn=("biases",), learn_steps=steps, learn_tokens=8)
        super().__init__(objective, layers, SimpleNamespace(), config)  # type: ignore[arg-type]
        self._losses = iter(losses)
        self.taken = 0

    def _step(self, sequences: Any) -> None:
        self.taken += 1
        with torch.no_grad():
            self.value += 1

    def _look(self, step: int, looked_at: Any) -> _Best:
        return _Best(step, next(self._losses), [self.value.detach().clone()])


def learn(losses: list[float], steps: int = 24) -> Scripted:
    training = Scripted(losses, steps)
    text = [torch.arange(8)] * 4
    training.run(text, text)
    return training


def test_losses_that_rise_while_the_rates_are_high_stop_nothing() -> None:
    """Twelve looks; the first eight see nothing better, the last ones do."""
    training = learn([1.0, *[2.0] * 8, 0.9, 0.8, 0.7, 0.6])
    assert training.taken == 24 and training.value.tolist() == [24.0] * 3


def test_without_progress_while_the_rates_fall_it_stops_with_the_best() -> None:
    training = learn([1.0, 0.5, *[2.0] * 11])
    # Rates fall from step 15 on: the looks at 16, 18 and 20 are those that count.
    assert training.taken == 20 and training.value.tolist() == [2.0] * 3


def test_nothing_better_than_the_beginning_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    training = learn([1.0, *[2.0] * 12])
    assert training.value.tolist() == [0.0] * 3
    assert any("gained nothing" in record.message for record in caplog.records)
