"""Tables that commands print."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..core.parameters import SCAPParameters
from ..errors import printable


if TYPE_CHECKING:
    from ..evaluation.report import Report


_WIDTH = 140


def print_parameters(folder: Path, parameters: Mapping[str, SCAPParameters]) -> None:
    """One row per pruned layer of every IR in `folder` (parameters by file name)."""
    # A table that is piped into a file or grep must not be folded to 80 columns.
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for name, found in parameters.items():
        table = Table(title=_as_it_is(f"{folder / name} (optimum-scap {found.version})"))
        table.add_column("layer")
        for column in ("role", "mode estimator"):
            table.add_column(column)
        for column in ("mode", "threshold", "target sparsity"):
            table.add_column(column, justify="right")
        for path, layer in found.layers.items():
            table.add_row(
                _as_it_is(path),
                _as_it_is(found.group(path)),
                layer.method,
                f"{layer.mode:.6g}",
                f"{layer.threshold:.6g}",
                f"{layer.target_sparsity:.3f}",
            )
        console.print(table)
        config = found.config
        console.print(
            _as_it_is(
                f"{len(found.layers)} layers, calibrated on {config.dataset} "
                f"({config.num_samples} samples of {config.seq_len} tokens, seed {config.seed})"
            )
        )


def print_report(report: "Report", *, targets: bool = False) -> None:
    """One column per contestant, one row per quantity: the values, and below them the ratios to the baseline.

    Args:
        report: what was measured.
        targets: whether to name what sparsity was asked for, beside what was realized.
    """
    table = Table()
    table.add_column("")
    for name in report.contestants:
        table.add_column(_as_it_is(name), justify="right")
    for quantity in report.quantities:
        label = quantity.name + (f", {quantity.unit}" if quantity.unit else "")
        ratios = report.ratios[quantity.name]
        cells = []
        for name in report.contestants:
            spread = quantity.spread(name)
            lines = [] if spread is None else [str(spread)]
            lines += [ratios[name].as_ratio()] if name in ratios else []
            cells.append(Text("\n".join(lines)))
        table.add_row(_as_it_is(label), *cells)
    console = Console(width=_WIDTH)
    console.print(table)
    console.print(_as_it_is(_legend(report)))
    for name, sparsity in report.sparsity.items():
        console.print(_as_it_is(f"{name} skips {sparsity.describe(targets=targets)}"))
    console.print(_as_it_is(", ".join(f"{key} {value}" for key, value in report.machine.items())))


def _legend(report: "Report") -> str:
    halves = [quantity.quartiles for quantity in report.quantities]
    around = "quartiles" if all(halves) else "smallest, largest" + (" (of steps: quartiles)" if any(halves) else "")
    return f"median [{around}]; x: times {report.baseline}, median of the ratios per repeat"


def _as_it_is(text: str) -> Text:
    """`text` without markup, emoji or control characters being read into it."""
    return Text(printable(text, 1000))
