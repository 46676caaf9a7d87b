"""A model over calibration samples, with a progress bar."""

from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.progress import Progress


class ProgressBar:
    """One bar on stderr for the whole of a job that may turn out longer than it seemed, with the time left of it.

    Args:
        description: what is done.
        total: steps it will probably take; None if that is not known.
    """

    def __init__(self, description: str, total: int | None) -> None:
        self._progress = Progress(console=Console(stderr=True))
        self._task = self._progress.add_task(description, total=total)

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self) -> None:
        self._progress.advance(self._task)

    def describe(self, description: str) -> None:
        """What is done, or how far it has come."""
        self._progress.update(self._task, description=description)

    def lengthen(self, steps: int | None) -> None:
        """It takes so many steps more than was expected."""
        total = self._progress.tasks[0].total
        if total is not None and steps is not None:
            self._progress.update(self._task, total=total + steps)


def run_over(samples: Iterable[Any], run: Callable[[Any], Any], total: int | None, description: str) -> int:
    """Calls `run` with each of `samples` behind a progress bar; returns how many there were."""
    count = 0
    with ProgressBar(description, total) as bar:
        for sample in samples:
            run(sample)
            bar.advance()
            count += 1
    return count


def length(samples: Iterable[Any]) -> int | None:
    """The number of samples, None where they do not tell."""
    try:
        return len(samples)  # type: ignore[arg-type]
    except TypeError:
        return None
