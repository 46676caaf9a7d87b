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
