"""What a kind of block has to say."""

from abc import ABC, abstractmethod

from torch import nn


class Block(ABC):
    """One kind of block."""

    @abstractmethod
    def matches(self, block: nn.Module, names: tuple[str, ...]) -> bool:
        """Whether `block`, whose children `names` read one input, is of this kind and can be converted."""

    @abstractmethod
    def convert(self, block: nn.Module, names: tuple[str, ...]) -> None:
        """Changes the class of `block`, which matches, so that those children run together."""
