"""What a reader of quantized checkpoints has to say, and bits that several of them share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...errors import SCAPError
from ..quantized import Storage, StoredTensor
from ..weights import IntegerWeights


class LayerShape(NamedTuple):
    """What is known of a layer before its weights are read.

    Args:
        path: of the module in the model, for messages.
        in_features, out_features: its channels.
    """

    path: str
    in_features: int
    out_features: int


class LayerStorage(ABC):
    """See `quantized.Storage`.

    Args:
        tensors: what the checkpoint holds of the layer.
        bits: of an integer.
        groups: of input channels that share a scale.
        dtype: of the scales.
        zero_points: of which kind they are.
    """

    def __init__(
        self, tensors: Mapping[str, StoredTensor], bits: int, groups: int, dtype: torch.dtype, zero_points: str
    ) -> None:
        self.tensors = tensors
        self.bits = bits
        self.groups = groups
        self.scale_dtype = dtype
        self.kind = (bits, groups, dtype, zero_points)

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor]) -> IntegerWeights: ...

    @abstractmethod
    def write(self, weights: IntegerWeights) -> dict[str, Tensor]: ...


class Reader(ABC):
    """One kind of quantized checkpoint.

    Args:
        name: what documents call it.
        methods: the `quant_method` of its `quantization_config`.
        marker: a tensor that every quantized layer has below its path, and no other layer.
    """

    name: str
    methods: tuple[str, ...]
    marker: str

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether this reader is for checkpoints with this `quantization_config`."""
        return config.get("quant_method") in self.methods

    @abstractmethod
    def check(self, config: Mapping[str, Any]) -> None:
        """Looks at what the config says about the whole checkpoint.

        Raises:
            SCAPError: naming what is not read.
        """

    @abstractmethod
    def storage(
        self,
        config: Mapping[str, Any],
        layer: LayerShape,
        stored: Mapping[str, StoredTensor],
        metadata: Mapping[str, str],
    ) -> Storage:
        """How the weights of `layer` are stored.

        Args:
            config: the `quantization_config`.
            layer: the layer.
            stored: what files hold below its path, but for its bias.
            metadata: of the file.

        Raises:
            SCAPError: naming the tensor that is missing, or whose shape or type is wrong.
        """

    def adopt(self, module: nn.Module, path: str) -> "Adopted | None":
        """What a module holds that the format's own library made; None if it is none, or not weight-only.

        Raises:
            SCAPError: if it is one whose weights are not read.
        """
        return None

    def kept_metadata(self, metadata: Mapping[str, str]) -> dict[str, str]:
        """Those of the metadata of a file that belong to the checkpoint."""
        return {}

    def made_metadata(self, model: nn.Module) -> dict[str, str]:
        """The same, of a model in memory that the format's own library made."""
        return {}

    def saved_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The `quantization_config` of the checkpoint that a model with this one is saved as."""
        return dict(config)


class Adopted(NamedTuple):
    """A layer that another library made."""

    layer: LayerShape
    storage: Storage
    tensors: Mapping[str, Tensor]
    bias: nn.Parameter | None


def expect(
    layer: LayerShape, stored: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[tuple[int, ...], Any]]
) -> dict[str, StoredTensor]:
    """Those of the tensors that are `wanted`, with shapes and types (one, or any of several).

    Raises:
        SCAPError: naming the one that is missing or different.
    """
    found = {}
    for name, (shape, dtypes) in wanted.items():
        tensor = stored.get(name)
        if tensor is None:
            raise SCAPError(f"{layer.path}.{name} is missing: the layer cannot be read without it")
        types = dtypes if isinstance(dtypes, tuple) else (dtypes,)
        if tensor.shape != shape:
            raise SCAPError(
                f"{layer.path}.{name} has the shape {list(tensor.shape)}; for {layer.in_features} input and "
                f"{layer.out_features} output channels it would be {list(shape)}"
            )
        if tensor.dtype not in types:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in types)
            raise SCAPError(f"{layer.path}.{name} is of type {str(tensor.dtype).removeprefix('torch.')}, not {names}")
        found[name] = tensor
    unknown = sorted(set(stored) - set(wanted))
    if unknown:
        raise SCAPError(f"{layer.path}.{unknown[0]} is a tensor that layers of this kind are not known to have")
    return found


def stored_as(tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """What a file would say about tensors."""
    return {name: StoredTensor(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def groups_of(layer: LayerShape, group_size: int | None) -> int:
    """How many groups of input channels a layer has; one per output channel if the size is None or not positive.

    Raises:
        SCAPError: if the size does not divide its input channels.
    """
    if group_size is None or group_size <= 0:
        return 1
    if layer.in_features % group_size != 0:
        raise SCAPError(
            f"layer {layer.path}: the group size {group_size} does not divide its {layer.in_features} input channels"
        )
    return layer.in_features // group_size


def to_signed(unsigned: Tensor, bits: int) -> Tensor:
    """int8 integers around 0 of uint8 integers around 2^(bits - 1)."""
    return (unsigned - (1 << bits - 1)).view(torch.int8)  # uint8 wraps around


def to_unsigned(signed: Tensor, bits: int) -> Tensor:
    """The reverse of `to_signed`."""
    return signed.contiguous().view(torch.uint8) + (1 << bits - 1)


def unpack_bits(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """The unsigned integers in words of 32 bits, uint8: `[rows, words]` to `[rows, words * 32 / bits]`.

    Args:
        words: int32.
        bits: 4 or 8.
        order: which integers of a word, counted from its lowest bits, come first, second, ...; from the lowest on by
            default.
    """
    places = order or tuple(range(32 // bits))
    mask = (1 << bits) - 1
    return torch.stack([(words >> bits * place & mask).to(torch.uint8) for place in places], dim=-1).flatten(-2)


def pack_bits(integers: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """The reverse of `unpack_bits`; the last word is filled with zeros."""
    places = order or tuple(range(32 // bits))
    rows, columns = integers.shape
    count = len(places)
    padded = integers.new_zeros((rows, -(-columns // count) * count))
    padded[:, :columns] = integers
    parts = padded.view(rows, -1, count).to(torch.int32)
    words = torch.zeros_like(parts[:, :, 0])
    for number, place in enumerate(places):
        words |= parts[:, :, number] << bits * place
    return words
