"""The steps of learning, and what ends them: their number, text that is held out, or Ctrl-C."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ...core.backend import Learned
from ...core.config import Part, SCAPConfig
from ...errors import SCAPError
from ...progress import ProgressBar
from .layers import LearnedLayers
from .objective import Objective
from .pruning import Measured
from .total import Total
from .windows import batches, draw_steps


logger = logging.getLogger(__name__)

# Peaks of the one-cycle schedule.
RATES: Mapping[Part, float] = {"thresholds": 0.02, "biases": 3e-3, "gains": 3e-3}
_BETAS = (0.9, 0.98)
# How often the held-out text is looked at, and after how many looks without progress learning stops. Before the rates
# fall, what is learned is thrown about by them: that no progress is seen there says nothing.
_LOOKS = 12
_PATIENCE = 3
_FALLING = 0.6


@dataclass
class _Best:
    step: int
    loss: float
    values: list[Tensor]


class Training:
    """Moves what is learned.

    Args:
        objective: what is minimized.
        layers: what is learned.
        total: what the thresholds hold.
        config: how long.
    """

    def __init__(self, objective: Objective, layers: LearnedLayers, total: Total, config: SCAPConfig) -> None:
        self._objective = objective
        self._layers = layers
        self._total = total
        self._config = config
        parts = layers.learned_tensors()
        self._tensors = [tensor for tensors in parts.values() for tensor in tensors]
        rates = {part: RATES[part] for part in parts}
        self._optimizer = torch.optim.Adam(
            [{"params": tensors, "lr": rates[part]} for part, tensors in parts.items()], betas=_BETAS
        )
        self._schedule: Any = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, list(rates.values()), total_steps=max(2, config.learn_steps), cycle_momentum=False
        )

    def run(self, learned_from: Sequence[Tensor], held_out: Sequence[Tensor]) -> Learned:
        """Learns; the best that was found on the held-out text.

        Args:
            learned_from, held_out: token sequences.

        Raises:
            SCAPError: if the loss is not finite.
            KeyboardInterrupt: if it is interrupted before anything was found.
        """
        steps = self._config.learn_steps
        looked_at = [(ids, self._objective.dense(ids)) for ids in self._batches(held_out)]
        best = first = self._look(0, looked_at)
        every, without_progress = max(1, math.ceil(steps / _LOOKS)), 0
        number = 0
        with ProgressBar(self._describe(first, best), steps) as bar:
            try:
                for step in islice(draw_steps(learned_from, self._config.learn_tokens, self._config.seed), steps):
                    self._step(step)
                    bar.advance()
                    number += 1
                    if number % every and number < steps:
                        continue
                    found = self._look(number, looked_at)
                    waits = found.loss >= best.loss and number > _FALLING * steps
                    without_progress = without_progress + 1 if waits else 0
                    best = found if found.loss < best.loss else best
                    bar.describe(self._describe(first, best))
                    if without_progress >= _PATIENCE:
                        logger.info("learning stopped at step %d: nothing was gained since %d", number, best.step)
                        break
            except KeyboardInterrupt:
                if best.step == 0:
                    raise
                logger.warning(
                    "learning was interrupted at step %d of %d: what was best so far (step %d, loss on held-out text "
                    "%.4f instead of %.4f) is calibrated and kept; interrupt again to stop",
                    *(number, steps, best.step, best.loss, first.loss),
                )
        if best.step == 0:
            logger.warning("learning gained nothing on text that was held out: nothing is changed; give more text")
        with torch.no_grad():
            for tensor, value in zip(self._tensors, best.values, strict=True):
                tensor.copy_(value)
        return self._layers.result()

    def _step(self, sequences: Sequence[Tensor]) -> None:
        tokens = sum(map(len, sequences))
        measured = Measured()
        self._optimizer.zero_grad()
        for ids in self._batches(sequences):
            dense = self._objective.dense(ids)
            self._layers.measured = measured
            try:
                self._objective.divergence(dense, self._objective.hidden(ids, sparse=True), backward=True)
            finally:
                self._layers.measured = None
        for tensor in self._tensors:
            if tensor.grad is not None:  # of the sum over tokens, which float16 can hold
                tensor.grad /= tokens
        self._total.add_gradients(measured, self._layers.log_thresholds)
        self._optimizer.step()
        self._schedule.step()

    @torch.no_grad()
    def _look(self, step: int, looked_at: Sequence[tuple[Tensor, Tensor]]) -> _Best:
        """The loss on the held-out text at the total, and what is learned so far."""
        measured, loss = Measured(), 0.0
        for ids, dense in looked_at:
            self._layers.measured = measured
            loss += self._objective.divergence(dense, self._objective.hidden(ids, sparse=True), backward=False)
            self._layers.measured = None
        loss /= sum(ids.numel() for ids, _ in looked_at)
        if not math.isfinite(loss):
            raise SCAPError(
                "the model's logits are NaN or infinite on the calibration data, dense or sparse: nothing can be "
                "learned in this precision"
            )
        if any(tensor.requires_grad for tensor in self._layers.log_thresholds.values()):
            loss = self._total.at_total(loss, self._total.gap(measured.sparsities()))
        return _Best(step, loss, [tensor.detach().clone() for tensor in self._tensors])

    def _batches(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        return batches(sequences, self._objective.tokens_at_once)

    def _describe(self, first: _Best, best: _Best) -> str:
        return f"SCAP learning, KL {first.loss:.4f}" + (f" -> {best.loss:.4f}" if best.step else "")
