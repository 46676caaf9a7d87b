"""The one exception users are meant to read."""


class SCAPError(ValueError):
    """A problem the user can solve: the message says what was wrong, where, and what to do."""
