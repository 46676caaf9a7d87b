"""What every benchmark script has: its docstring as help, `--json`, and a file that names the machine."""

import argparse
import json
from pathlib import Path
from typing import Any

from optimum_scap.evaluation.machine import describe_machine
from optimum_scap.evaluation.report import Report


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with `description`, the docstring of a script, as it is."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def add_texts(parser: argparse.ArgumentParser, model: str, specification: str | None = None) -> None:
    """Arguments of what is calibrated on one text and evaluated on another; `model` says what kind of folder it is.

    `specification` is the default of `--scap`; without one the flag may be repeated.
    """
    parser.add_argument("model", type=Path, help=model)
    parser.add_argument("calibration", type=Path, help="text file to calibrate on")
    parser.add_argument("evaluation", type=Path, help="text file to evaluate on")
    if specification is None:
        parser.add_argument("--scap", action="append", help="specification; repeat for several")
    else:
        parser.add_argument("--scap", default=specification)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=6144)


def write(file: Path | None, figures: dict[str, Any] | Report, *, gpu: bool = False) -> None:
    """Writes figures as JSON, if there is a file to write to.

    Args:
        file: what `--json` gave.
        figures: a report, which names its machine; or a dictionary, in front of which the machine is put.
        gpu: whether they were measured on a GPU.
    """
    if file is None:
        return
    if isinstance(figures, Report):
        text = figures.to_json()
    else:
        text = json.dumps({"machine": describe_machine(gpu=gpu), **figures}, indent=2) + "\n"
    file.write_text(text, encoding="utf-8")
