"""The one exception users are meant to read, and what it says about the exceptions of other libraries."""

import re
from collections.abc import Iterator


_OPENVINO_PLACE = re.compile(r"(Exception from \S+:\d+|Check '.*' failed at \S+:\d+):$")
_PYDANTIC_HEADING = re.compile(r"\d+ validation errors? for ")
_PYDANTIC_DETAILS = re.compile(r" \[type=\w+, input_value=.*\]$")


class SCAPError(ValueError):
    """A problem the user can solve: the message says what was wrong, where, and what to do."""


def first_line(error: BaseException) -> str:
    """The reason that `error` gives, as one line: without headings, places in a library's source, and advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if _OPENVINO_PLACE.match(lines[0]):
        return next((line for line in lines if not line.endswith(":")), lines[-1])
    if _PYDANTIC_HEADING.match(lines[0]) and len(lines) > 2:
        return f"{lines[1]}: {_PYDANTIC_DETAILS.sub('', lines[2])}"
    reason = lines[0]
    for line in lines[1:]:
        if not reason.endswith(":"):  # a heading
            break
        reason = f"{reason} {line}"
    if len(lines) > 1 and reason == lines[0]:
        reason = _whole_sentences(reason)
    # The message of a KeyError is nothing but the key.
    return reason if " " in reason else f"{type(error).__name__}: {reason}"


def printable(text: str, limit: int = 200) -> str:
    """`text` from a file or a model for a message of one line: escaped where it is not printable, cut where long."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[:limit])
    return shown if len(text) <= limit else f"{shown}..."


def interruption_behind(error: BaseException) -> BaseException | None:
    """The KeyboardInterrupt or SystemExit during whose handling `error` was raised, None if there is none.

    Libraries turn an interruption into errors of their own: transformers evaluates the condition of an `except` that
    imports a library which is not there.
    """
    return next((found for found in errors_behind(error) if isinstance(found, KeyboardInterrupt | SystemExit)), None)


def errors_behind(error: BaseException) -> Iterator[BaseException]:
    """`error` and all that it was raised from or during, members of groups among them."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        found = pending.pop()
        if found is None or id(found) in seen:
            continue
        yield found
        seen.add(id(found))
        pending += [found.__context__, found.__cause__, *getattr(found, "exceptions", ())]


def raise_interruption_behind(error: BaseException) -> None:
    """Raises the interruption behind `error` if there is one: asked first wherever any exception gets another name.

    Raises:
        KeyboardInterrupt: or SystemExit, as it came.
    """
    interruption = interruption_behind(error)
    if interruption is not None:
        raise interruption from None


def _whole_sentences(line: str) -> str:
    """`line` without a sentence that goes on in the next one."""
    end = line.rfind(". ")
    return line if end < 0 or line.endswith((".", "!", "?", ",", ")", "'", '"')) else line[: end + 1]
