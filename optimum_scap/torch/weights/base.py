"""How the weights of a fully connected layer are stored: the interface of a format, and the formats by name.

A format is a file of this package, imported by `__init__`, that registers an instance of its `WeightFormat`, and
functions of `kernels/load.py` that read such weights on a GPU. Whatever else there is knows no format.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F


class Weights(NamedTuple):
    """The weights of one layer.

    Args:
        format: name of their format.
        tensors: what the format makes of `[out_features, in_features]` weights.
    """

    format: str
    tensors: tuple[Tensor, ...]


class KernelArguments(NamedTuple):
    """What the kernels and the format's function in `kernels/load.py` are told about the weights of a layer.

    Args:
        tensors: handed on as pointers. The first holds the weights, in words of one or more output channels; the
            layers of a launch have tensors of the same types.
        strides: in elements, as many as the function wants.
        constants: known when the function is compiled; the same for all layers of a launch.
        columns_per_word: output channels whose weights a word holds.
        words_per_tile: output channels come in tiles of so many words. Part p of word w of tile t is output channel
            (t * columns_per_word + p) * words_per_tile + w; the last tile may be wider than what is left.
        group_size: input channels whose sums are scaled together; None if weights need no scaling.
    """

    tensors: tuple[Tensor, ...]
    strides: tuple[int, ...]
    constants: tuple[Any, ...] = ()
    columns_per_word: int = 1
    words_per_tile: int = 1
    group_size: int | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the layers of a launch have in common."""
        return (self.constants, self.group_size, *(tensor.dtype for tensor in self.tensors))

    @property
    def bits(self) -> int:
        """Bits per weight."""
        return 8 * self.tensors[0].element_size() // self.columns_per_word


Stored = TypeVar("Stored")


class WeightFormat(ABC, Generic[Stored]):
    """A way to store weights. Instances hold no weights and no state: sizes of groups and the like follow from shapes.

    Args:
        Stored: what such weights are made of: a floating-point tensor, `integers.IntegerWeights`.
        name: the ecosystem's name for the format.
        tensor_count: tensors that the weights of a layer are.
    """

    name: str
    tensor_count: int

    def layers(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """The tensors of each layer, of those of several layers in turn."""
        count = self.tensor_count
        if len(tensors) % count != 0:
            raise ValueError(f"{self.name} weights are {count} tensors per layer, got {len(tensors)} tensors")
        return [tuple(tensors[first : first + count]) for first in range(0, len(tensors), count)]

    @abstractmethod
    def pack(self, stored: Stored) -> Weights:
        """Weights as the sparse kernels read them, one input channel after the other."""

    @abstractmethod
    def unpack(self, tensors: Sequence[Tensor]) -> Stored:
        """What `pack` was given, for saving: the same numbers, in the order of a checkpoint."""

    @abstractmethod
    def shape(self, tensors: Sequence[Tensor]) -> tuple[int, int]:
        """out_features and in_features."""

    @abstractmethod
    def dequantize(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """`[out_features, in_features]` of this floating-point type or the format's own, in any order in memory."""

    def row_sums(self, tensors: Sequence[Tensor]) -> Tensor:
        """W·1, the sum over the input channels: `[out_features]`, float32. A mode is folded into the bias with it."""
        return self.dequantize(tensors).sum(dim=1, dtype=torch.float32)

    def multiply(self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        """The dense layer for many rows: `[..., in_features]` to `[..., out_features]`, in the type of `x`."""
        return F.linear(x, self.dequantize(tensors, x.dtype), bias)

    @abstractmethod
    def kernel_arguments(self, tensors: Sequence[Tensor], input_major: bool) -> KernelArguments:
        """What a kernel is given.

        Args:
            tensors: the weights of one layer.
            input_major: whether the kernel reads single input channels, as the sparse ones do, or single output
                channels, as the dense one does.

        Raises:
            ValueError: if the weights do not lie in memory as such a kernel reads them.
        """


_formats: dict[str, WeightFormat[Any]] = {}


def register(weight_format: WeightFormat[Any]) -> None:
    """Makes a format known under its name."""
    _formats[weight_format.name] = weight_format


def find_format(name: str) -> WeightFormat[Any]:
    """The format of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in _formats:
        raise ValueError(f"unknown weight format {name!r}, choose from {', '.join(sorted(_formats))}")
    return _formats[name]
