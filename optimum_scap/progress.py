"""A model over calibration samples, with a progress bar."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from rich.console import Console
from rich.progress import track


def run_over(
    samples: Iterable[Any], run: Callable[[Any], Any], total: int | None, description: str, limit: int | None = None
) -> int:
    """Calls `run` with each of (the first `limit` of) `samples` behind a progress bar; returns how many there were."""
    expected = [number for number in (total, limit) if number is not None]
    count = 0
    for sample in track(
        islice(samples, limit),
        description=description,
        total=min(expected) if expected else None,
        console=Console(stderr=True),
    ):
        run(sample)
        count += 1
    return count


def length(samples: Iterable[Any]) -> int | None:
    """The number of samples, None where they do not tell."""
    try:
        return len(samples)  # type: ignore[arg-type]
    except TypeError:
        return None
