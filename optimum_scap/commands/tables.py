"""Tables that commands print."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..calibration import SCAPParameters


def print_parameters(folder: Path, parameters: Mapping[str, SCAPParameters]) -> None:
    """One row per pruned layer of every IR in `folder` (parameters by file name)."""
    # A table that is piped into a file or grep must not be folded to 80 columns.
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for name, found in parameters.items():
        table = Table(title=f"{folder / name} (optimum-scap {found.version})")
        table.add_column("layer")
        for column in ("role", "mode estimator"):
            table.add_column(column)
        for column in ("mode", "threshold", "target sparsity"):
            table.add_column(column, justify="right")
        for path, layer in found.layers.items():
            table.add_row(
                path,
                layer.role,
                layer.method,
                f"{layer.mode:.6g}",
                f"{layer.threshold:.6g}",
                f"{layer.target_sparsity:.3f}",
            )
        console.print(table)
        config = found.config
        console.print(
            f"{len(found.layers)} layers, calibrated on {config.dataset} "
            f"({config.num_samples} samples of {config.seq_len} tokens, seed {config.seed})"
        )
