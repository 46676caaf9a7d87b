"""Fully connected layers over integer weights.

A checkpoint's own tensors are buffers of the layer until they are loaded; then they are packed for the kernels, and
written as they were when the layer is saved: names, types and values of the checkpoint stay.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import SCAPError, first_line
from .dispatch import is_one_row, may_call_kernel
from .given import GivenOutput
from .kernels import linear_group
from .weights import IntegerWeights, Weights, find_format


class StoredTensor(NamedTuple):
    """What the header of a file says about a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Storage(Protocol):
    """How a checkpoint stores the weights of one layer; made by a reader of `readers`.

    Args:
        tensors: the names of its tensors below the path of the layer, and what they are. A bias is none of them.
        bits: of an integer.
        groups: of input channels that share a scale.
        scale_dtype: of the scales.
    """

    tensors: Mapping[str, StoredTensor]
    bits: int
    groups: int
    scale_dtype: torch.dtype
    # What layers have in common that run in one launch: all of these, and the kind of zero points.
    kind: tuple[Any, ...]

    def read(self, tensors: Mapping[str, Tensor]) -> IntegerWeights:
        """The weights.

        Raises:
            ValueError: naming the tensor that is wrong.
        """

    def write(self, weights: IntegerWeights) -> dict[str, Tensor]:
        """What `read` was given, bit by bit."""


# Names of the buffers that hold the tensors of a memory format.
_PACKED = "scap_packed_{}"


class QuantizedLinear(nn.Module):
    """A fully connected layer that is left dense, over integer weights.

    Args:
        in_features, out_features: its channels.
        bias: `[out_features]`, or None.
        storage: how the weights are stored in a checkpoint.
        dtype: of the activations.
        name: of the layer in messages.
    """

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    scap_storage: Storage
    scap_dtype: torch.dtype
    scap_name: str
    # The memory format; None until the weights are there.
    scap_format: str | None
    scap_given: GivenOutput | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: Tensor | None,
        storage: Storage,
        dtype: torch.dtype,
        name: str = "",
    ) -> None:
        super().__init__()
        self.become(self, in_features, out_features, bias, storage, dtype, name)
        for tensor, (shape, kind) in storage.tensors.items():
            self.register_buffer(tensor, torch.empty(shape, dtype=kind, device="meta"))

    @staticmethod
    def become(
        module: nn.Module,
        in_features: int,
        out_features: int,
        bias: Tensor | None,
        storage: Storage,
        dtype: torch.dtype,
        name: str,
    ) -> None:
        """Gives `module`, whose class is this or becomes it, what every instance has."""
        made: Any = module
        made.in_features, made.out_features = in_features, out_features
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        made.register_parameter("bias", bias)
        made.scap_storage, made.scap_dtype, made.scap_name = storage, dtype, name
        made.scap_format = None

    @property
    def is_packed(self) -> bool:
        """Whether the weights are there."""
        return self.scap_format is not None

    def pack(self) -> None:
        """Packs the weights that were loaded into the buffers named as in the checkpoint, which are freed.

        Raises:
            SCAPError: naming the layer and the tensor that is wrong.
        """
        buffers: Any = self._buffers
        self.take({name: buffers[name] for name in self.scap_storage.tensors})
        for name in self.scap_storage.tensors:
            del buffers[name]

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over weights that are given by the tensors of a checkpoint.

        Raises:
            SCAPError: naming the layer and the tensor that is wrong.
        """
        try:
            read = self.scap_storage.read(tensors)
            weights = find_format(f"int{read.bits}").pack(read)
        except (ValueError, RuntimeError) as error:
            raise SCAPError(f"layer {self.scap_name}: {first_line(error)}") from error
        self.scap_format = weights.format
        for number, tensor in enumerate(weights.tensors):
            self.register_buffer(_PACKED.format(number), tensor, persistent=False)

    def kernel_weights(self) -> Weights:
        """What a kernel is given."""
        return self.packed_weights()

    def packed_weights(self) -> Weights:
        """The weights as the kernels read them."""
        buffers: Any = self._buffers
        assert self.scap_format is not None, "the weights are not loaded yet"
        count = find_format(self.scap_format).tensor_count
        return Weights(self.scap_format, tuple(buffers[_PACKED.format(number)] for number in range(count)))

    def kind_of_weights(self) -> Any:
        """What layers have in common that run in one launch; known before the weights are loaded."""
        return self.scap_storage.kind

    def stored_tensors(self) -> dict[str, Tensor]:
        """The tensors of the checkpoint."""
        if not self.is_packed:
            buffers: Any = self._buffers
            return {name: buffers[name] for name in self.scap_storage.tensors}
        format, tensors = self.packed_weights()
        return self.scap_storage.write(find_format(format).unpack(tensors))

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """`[out_features, in_features]`."""
        format, tensors = self.packed_weights()
        return find_format(format).dequantize(tensors, dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights are; meta until they are loaded."""
        if not self.is_packed:
            return next(iter(self._buffers.values())).device  # type: ignore[union-attr]
        return self.packed_weights().tensors[0].device

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias for any rows `[..., in_features]`, in the type of `x`."""
        format, tensors = self.packed_weights()
        return find_format(format).multiply(x, tensors, bias)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if is_one_row(input):
            given = self.scap_given
            if given is not None and (output := given.take(input)) is not None:
                return output
            if self.runs_our_kernel(input):
                return linear_group(input, [self.packed_weights()], [self.bias])[0]
        return self.multiply(input, self.bias)

    def runs_our_kernel(self, x: Tensor) -> bool:
        """Whether a forward of one token `x` `[..., in_features]` runs the kernel."""
        return x.is_cuda and may_call_kernel(x, self)

    def extra_repr(self) -> str:
        weights = self.packed_weights() if self.is_packed else None
        held = "not loaded" if weights is None else weights.format
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {held}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        buffers: Any = self._buffers
        own = [*self.scap_storage.tensors, *(name for name in buffers if name.startswith(_PACKED[:-2]))]
        kept = {name: buffers.pop(name) for name in own if name in buffers}
        result = super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = fn(tensor)
            # Only the device counts: scales stay what they are in the checkpoint.
            buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        self.scap_dtype = fn(torch.empty(0, dtype=self.scap_dtype)).dtype
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed:
            destination.update({f"{prefix}{name}": tensor for name, tensor in self.stored_tensors().items()})

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing: Any, *others: Any
    ) -> None:
        names = {f"{prefix}{name}": name for name in self.scap_storage.tensors}
        rest = {key: value for key, value in state_dict.items() if key not in names}
        absent = [key for key in names if key not in state_dict]
        if absent:
            missing += absent
        else:
            device = self.device if self.is_packed else None
            self.take({name: state_dict[key].to(device or state_dict[key].device) for key, name in names.items()})
            for name in names.values():
                self._buffers.pop(name, None)
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, *others)
