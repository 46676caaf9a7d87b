"""How much of what enters each layer is skipped: the one definition of every backend. Knows no framework."""


class SkippedChannels:
    """Sums over the tokens of all samples, whatever the length of each."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, path: str, skipped: float, tokens: float) -> None:
        """Adds what one sample skips in a layer: the sum over its `tokens` of the fraction of channels skipped."""
        sums = self._sums.setdefault(path, [0.0, 0.0])
        sums[0] += skipped
        sums[1] += tokens

    def fractions(self) -> dict[str, float]:
        """The fraction of input channels skipped per token, by layer; layers that no token reached are left out."""
        return {path: skipped / tokens for path, (skipped, tokens) in self._sums.items() if tokens}
