"""Parameters that several modules of a model share."""

from collections import Counter

from torch import nn


class Owners:
    """How many modules hold a parameter as their own: `owners[parameter]`."""

    def __init__(self, model: nn.Module) -> None:
        self._counts = Counter(id(value) for module in model.modules() for value in module._parameters.values())

    def __getitem__(self, parameter: object) -> int:
        return self._counts[id(parameter)]
