"""The one exception users are meant to read."""


class SCAPError(ValueError):
    """A problem the user can solve: the message says what was wrong, where, and what to do."""


def first_line(error: BaseException) -> str:
    """What `error` says, as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].endswith(":"):  # a heading
        return " ".join(lines[:2])
    # OpenVINO puts the place in its own source first and the reason last.
    return lines[-1] if lines[0].startswith("Exception from") else lines[0]


def interruption_behind(error: BaseException) -> BaseException | None:
    """The KeyboardInterrupt or SystemExit that `error` took the place of, None if there is none."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        if isinstance(current, KeyboardInterrupt | SystemExit):
            return current
        seen.append(current)
        current = current.__cause__ or current.__context__
    return None
