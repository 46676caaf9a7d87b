"""Outputs that a block computes ahead and leaves with its layers, see `blocks.shared_input`."""

from torch import Tensor


class GivenOutput:
    """An output that was computed ahead, for one input."""

    def __init__(self) -> None:
        self._input_and_output: tuple[Tensor, Tensor] | None = None

    def put(self, x: Tensor, output: Tensor) -> None:
        """Leaves `output` for the call with `x`, the very tensor."""
        self._input_and_output = (x, output)

    def take(self, x: Tensor) -> Tensor | None:
        """The output for `x`, once; None if there is none."""
        found = self._input_and_output  # once: other threads may put theirs
        if found is None or found[0] is not x:
            return None
        self._input_and_output = None
        return found[1]

    def forget(self) -> bool:
        """Whether there was an output that nobody took."""
        if self._input_and_output is None:
            return False
        self._input_and_output = None
        return True
