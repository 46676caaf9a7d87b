"""Realized sparsity summarized: the one place for every backend, table and file."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any

from pydantic import computed_field
from pydantic.dataclasses import dataclass

from ..core.parameters import SCAPParameters
from ..core.roles import OTHER, find_role


if TYPE_CHECKING:
    import openvino as ov
    from torch import nn


@dataclass(frozen=True)
class LayerSparsity:
    """One layer.

    Attributes:
        group: its role, or what stands for it, see `SCAPParameters.group`.
        weights: how many it has.
        skipped: the fraction of its input channels, and so of its weights, that is skipped per token.
        target: the fraction that was asked for; None if that is not known.
    """

    group: str
    weights: int
    skipped: float
    target: float | None = None


@dataclass(frozen=True)
class RealizedSparsity:
    """What a sparse model skips on a text.

    Attributes:
        layers: the pruned layers that a token reached, by module path.
    """

    layers: dict[str, LayerSparsity] = field(default_factory=dict)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def by_role(self) -> dict[str, float]:
        """The mean fraction skipped over the layers of each role (or group)."""
        return self._means(lambda layer: layer.skipped)

    @property
    def targets(self) -> dict[str, float]:
        """The mean target over the layers of each role (or group) whose targets are known."""
        return self._means(lambda layer: layer.target)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def overall(self) -> float | None:
        """The fraction of the pruned layers' weights that is skipped; None if there are none."""
        weights = sum(layer.weights for layer in self.layers.values())
        return sum(layer.skipped * layer.weights for layer in self.layers.values()) / weights if weights else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def largest_miss(self) -> float | None:
        """The largest |skipped - target| of a layer; None if no target is known."""
        misses = [abs(layer.skipped - layer.target) for layer in self.layers.values() if layer.target is not None]
        return max(misses, default=None)

    def describe(self, *, targets: bool = False) -> str:
        """`gate 35.0%, up 35.0%, down 55.0%; 41.7% of the weights of pruned layers`.

        With `targets` also what was asked for, `gate 34.8% (35%)`, and the largest miss of a layer.
        """
        wanted = self.targets if targets else {}
        roles = ", ".join(
            f"{role} {value:.1%}" + (f" ({100 * wanted[role]:.3g}%)" if role in wanted else "")
            for role, value in self.by_role.items()
        )
        overall = "" if self.overall is None else f"; {self.overall:.1%} of the weights of pruned layers"
        if not targets or self.largest_miss is None:
            return roles + overall
        return f"{roles}{overall}, largest miss of a target {self.largest_miss:.3f}"

    def _means(self, value_of: Any) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for layer in self.layers.values():
            value = value_of(layer)
            if value is not None:
                found.setdefault(layer.group, []).append(value)
        return {group: statistics.fmean(values) for group, values in found.items()}


def realized(
    skipped: Mapping[str, float], weights: Mapping[str, int], parameters: SCAPParameters | None = None
) -> RealizedSparsity:
    """What `measure_sparsity` found, with what is known about the layers.

    Args:
        skipped: the fraction of input channels that is skipped, by module path.
        weights: the number of weights of each of these layers.
        parameters: of the model, if it carries any.
    """
    layers = {}
    for path, value in skipped.items():
        known = parameters is not None and path in parameters.layers
        layers[path] = LayerSparsity(
            group=parameters.group(path) if parameters is not None and known else find_role(path) or OTHER,
            weights=weights[path],
            skipped=value,
            target=parameters.layers[path].target_sparsity if parameters is not None and known else None,
        )
    return RealizedSparsity(layers)


def realized_by_openvino(model: "ov.Model", samples: Iterable[Any], total: int | None = None) -> RealizedSparsity:
    """What the layers of a sparse `model` skip on `samples`; see `core.backend.measure_sparsity`."""
    from ..openvino.backend import measure_sparsity, read_parameters
    from ..openvino.graph import find_fully_connected

    weights = {layer.path: layer.in_features * layer.out_features for layer in find_fully_connected(model)}
    return realized(measure_sparsity(model, samples, total), weights, read_parameters(model))


def realized_by_torch(model: "nn.Module", samples: Iterable[Any]) -> RealizedSparsity:
    """The same for a torch model."""
    from ..torch.backend import measure_sparsity, pruned_layers, read_parameters
    from ..torch.prunable import in_features, out_features

    weights = {path: in_features(layer) * out_features(layer) for path, layer in pruned_layers(model).items()}
    return realized(measure_sparsity(model, samples), weights, read_parameters(model))
