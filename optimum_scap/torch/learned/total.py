"""The total sparsity, held while thresholds are learned: an augmented Lagrangian.

    gap    = total - sum over groups of w * sparsity / sum of w
    loss  += STIFFNESS * gap^2 + price * gap,     price += PATIENCE * gap   after every step

`price` comes to be what a unit of sparsity costs in loss.
"""

from collections.abc import Mapping

from torch import Tensor

from ...core.totals import weighted_total
from .pruning import Measured


STIFFNESS = 40.0
PATIENCE = 4.0


class Total:
    """What is asked of all groups together.

    Args:
        total: the sparsity, weighted by weights.
        weights: of every group, by key.
    """

    def __init__(self, total: float, weights: Mapping[str, int]) -> None:
        self._total = total
        self._weights = weights
        self._price = 0.0

    def gap(self, sparsities: Mapping[str, float]) -> float:
        """How much less is pruned than is asked for. Groups that no token reached do not count."""
        weights = {key: self._weights[key] for key in sparsities}
        return self._total - weighted_total(sparsities, weights)

    def add_gradients(self, measured: Measured, log_thresholds: Mapping[str, Tensor]) -> float:
        """Adds the gradients of the penalty to those of the thresholds, and moves the price; returns the gap."""
        sparsities = measured.sparsities()
        gap = self.gap(sparsities)
        all_weights = sum(self._weights[key] for key in sparsities)
        push = -(2 * STIFFNESS * gap + self._price)
        for key, slope in measured.slopes().items():
            threshold = log_thresholds[key]
            if threshold.requires_grad:
                gradient = push * self._weights[key] / all_weights * slope
                threshold.grad = gradient if threshold.grad is None else threshold.grad + gradient
        self._price += PATIENCE * gap
        return gap

    def at_total(self, loss: float, gap: float) -> float:
        """What `loss` would be at the total: the rest is paid for at its price."""
        return loss + max(0.0, self._price) * gap
