"""Tables that commands print."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..core.parameters import SCAPParameters
from ..errors import printable
from ..evaluation.sparsity import describe


if TYPE_CHECKING:
    from ..evaluation.speed import Measurement


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
                layer.role,
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


def print_benchmark(measurements: Sequence["Measurement"], sparsity: Mapping[str, float]) -> None:
    """One row per model; speeds as median [smallest, largest], and against the first model."""
    first = measurements[0]
    names = [measurement.name for measurement in measurements]
    table = _table("model", "decode tok/s", f"vs {first.name}", "peak memory MiB", "load s", "to first token s")
    for measurement in measurements:
        table.add_row(
            _as_it_is(measurement.name),
            _as_it_is(str(measurement.decode)),
            f"{measurement.decode.median / first.decode.median:.2f}x",
            f"{measurement.peak_memory_mib:.0f}",
            f"{measurement.load_seconds:.1f}",
            "" if measurement.first_token_seconds is None else f"{measurement.first_token_seconds:.1f}",
        )
    prefill = _table(
        "prefill", *[f"{name}, tok/s" for name in names], *[f"{name} vs {first.name}" for name in names[1:]]
    )
    for length, reference in first.prefill.items():
        prefill.add_row(
            f"{length} tokens",
            *[_as_it_is(str(m.prefill[length])) for m in measurements],
            *[f"{m.prefill[length].median / reference.median:.2f}x" for m in measurements[1:]],
        )
    console = Console(width=120)
    console.print(table)
    console.print(prefill)
    console.print(_as_it_is(f"skipped: {describe(sparsity)}"))


def _table(*headers: str) -> Table:
    table = Table()
    for header in headers:
        table.add_column(_as_it_is(header))
    return table


def _as_it_is(text: str) -> Text:
    """`text` without markup, emoji or control characters being read into it."""
    return Text(printable(text, 1000))
