"""Signals that end a command: they become exceptions, so that it cleans up, and wait while folders change places."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Terminated(SystemExit):
    """SIGTERM or SIGHUP; the exit code is the shell's for it."""

    def __init__(self, number: int, note: str = "") -> None:
        super().__init__(128 + number)
        self.note = note


def note_of(error: BaseException) -> str:
    """What was done before a signal that waited ended the block; empty for other exceptions."""
    if isinstance(error, KeyboardInterrupt):
        return str(error.args[0]) if error.args else ""
    return error.note if isinstance(error, Terminated) else ""


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block with Terminated, as SIGINT does with KeyboardInterrupt."""
    with _handled(_raise):
        yield


@contextmanager
def signals_deferred(note: str = "") -> Iterator[None]:
    """A signal that would end the block ends it when it is over; `note` says in the exception what was done."""
    waiting: list[int] = []
    with _handled(lambda number, _frame: waiting.append(number)):
        yield
    if waiting:
        _raise(waiting[0], None, note)


def _raise(number: int, _frame: object, note: str = "") -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt(*([note] if note else []))
    raise Terminated(number, note)


@contextmanager
def _handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """`handler` for the signals that are not ignored (as nohup has it), and what was there before, afterward."""
    previous: dict[int, Any] = {}
    try:
        for number in _ENDING:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread, where no signal arrives
        pass
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
