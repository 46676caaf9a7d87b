"""One object behind every table and every JSON file: contestants in columns, quantities in rows.

A ratio is the median of the ratios per repeat. Contestants take turns, so that repeat i of one and repeat i of another
saw the same machine; a quotient of two medians would compare different moments.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, computed_field, model_validator

from .sparsity import RealizedSparsity


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and what lies around it: all of them, or the middle half."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float], *, quartiles: bool = False) -> "Spread":
        """Of at least one value: from the smallest to the largest, or with `quartiles` from the first to the third."""
        low, high = min(values), max(values)
        if quartiles and len(values) > 1:
            low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high)

    def __str__(self) -> str:
        """`12.5 [12.1, 12.9]`, four digits of each; one number where there is no spread."""
        return self._format(lambda value: f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}")

    def as_ratio(self) -> str:
        """`1.250x [1.212, 1.287]`."""
        return self._format(lambda value: f"{value:.3f}", "x")

    def _format(self, number: Callable[[float], str], unit: str = "") -> str:
        around = f" [{number(self.low)}, {number(self.high)}]" if self.low < self.high else ""
        return f"{number(self.median)}{unit}{around}"


class Quantity(BaseModel):
    """One row: what was measured of every contestant.

    Args:
        name: `decode`, `prefill of 128 tokens`, `peak memory`, `perplexity` and so on.
        unit: of the values; empty for plain numbers.
        values: one per repeat, by contestant; as many of each, and the i-th of all belong together. A contestant
            that was not measured is left out.
        quartiles: whether spreads are quartiles: for single steps, of which the slowest says nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    unit: str = ""
    values: dict[str, tuple[FiniteFloat, ...]] = Field(min_length=1)
    quartiles: bool = False

    @model_validator(mode="after")
    def _repeats_belong_together(self) -> "Quantity":
        counts = {len(values) for values in self.values.values()}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(f"{self.name}: needs as many values of every contestant, and at least one")
        return self

    def spread(self, contestant: str) -> Spread | None:
        """Of what was measured; None if this contestant was not."""
        values = self.values.get(contestant)
        return None if values is None else Spread.of(values, quartiles=self.quartiles)

    def ratio(self, contestant: str, baseline: str) -> Spread | None:
        """Of the ratios per repeat to the `baseline`; None if one of both was not measured, or that one is zero."""
        values, others = self.values.get(contestant), self.values.get(baseline)
        if values is None or others is None or 0 in others:
            return None
        ratios = [value / other for value, other in zip(values, others, strict=True)]
        return Spread.of(ratios, quartiles=self.quartiles)


class Report(BaseModel):
    """What was measured, of whom, and on what. Its JSON holds the ratios too, for whoever reads the file alone.

    Args:
        contestants: what each is (a folder's name, a specification), by name, in the order of the columns.
        baseline: the contestant that ratios refer to.
        quantities: in the order of the rows.
        sparsity: what sparse contestants skip.
        machine: see `machine.describe_machine`.
        settings: how it was measured.

    Raises:
        pydantic.ValidationError: (a ValueError) if something belongs to no contestant.
    """

    model_config = ConfigDict(frozen=True)

    machine: dict[str, str]
    settings: dict[str, Any] = Field(default_factory=dict)
    contestants: dict[str, str] = Field(min_length=1)
    baseline: str
    quantities: tuple[Quantity, ...] = ()
    sparsity: dict[str, RealizedSparsity] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _everything_has_a_contestant(self) -> "Report":
        named = {self.baseline, *self.sparsity}.union(*(quantity.values for quantity in self.quantities))
        unknown = sorted(named - self.contestants.keys())
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: no contestant is called so")
        if len({quantity.name for quantity in self.quantities}) < len(self.quantities):
            raise ValueError("two quantities have the same name")
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratios(self) -> dict[str, dict[str, Spread]]:
        """Ratios to the baseline, by quantity and contestant."""
        return {
            quantity.name: {
                name: ratio
                for name in self.contestants
                if name != self.baseline and (ratio := quantity.ratio(name, self.baseline)) is not None
            }
            for quantity in self.quantities
        }

    def quantity(self, name: str) -> Quantity:
        """The row that is called so.

        Raises:
            KeyError: if there is none.
        """
        for quantity in self.quantities:
            if quantity.name == name:
                return quantity
        raise KeyError(name)

    def to_json(self) -> str:
        """Indented, with a line break behind it."""
        return self.model_dump_json(indent=2) + "\n"
