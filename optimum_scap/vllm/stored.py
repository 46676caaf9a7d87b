"""The integer weights of a checkpoint, and the shards of them that ranks hold. Needs no vLLM.

A rank reads a layer's tensors whole, whatever order their integers are stored in, and cuts the integers that they
hold: outputs anywhere, inputs between two groups that share a scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..core.roles import find_role
from ..errors import SCAPError, first_line, printable
from ..torch.quantized import Storage, StoredTensor
from ..torch.readers import find_reader, stored_layers
from ..torch.readers.base import LayerShape, Reader
from ..torch.weights import IntegerWeights, Weights, find_format


# Others keep a part of what they are in the headers of their files, which vLLM does not show.
SERVED = ("compressed-tensors", "GPTQ", "AWQ")


def reader_for(config: Mapping[str, Any]) -> Reader:
    """The reader of checkpoints with this `quantization_config`, if vLLM can run them below SCAP.

    Raises:
        SCAPError: naming what is not read.
    """
    reader = find_reader(config)
    if reader is None or reader.name not in SERVED:
        method = printable(str(config.get("quant_method")))
        raise SCAPError(
            f"the weights are quantized ({method}), and under vLLM SCAP runs float weights and those of "
            f"{', '.join(SERVED)} alone; load this checkpoint with transformers"
        )
    reader.check(config)
    return reader


@dataclass(frozen=True)
class Cut:
    """What a rank holds of a layer.

    Args:
        in_features, out_features: of the whole layer.
        first_in, count_in: its input channels.
        first_out, count_out: its output channels.
    """

    in_features: int
    out_features: int
    first_in: int
    count_in: int
    first_out: int
    count_out: int


@dataclass
class StoredLayers:
    """The quantized layers of a checkpoint.

    Args:
        config: its `quantization_config`.
        layers: what its files hold of each, by path and name below it.
    """

    config: Mapping[str, Any]
    layers: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)

    @classmethod
    def found(cls, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> "StoredLayers":
        """Of a checkpoint whose files hold `tensors`.

        Raises:
            SCAPError: if there are none, or some that are not run.
        """
        marker = reader_for(config).marker
        layers = stored_layers(tensors, marker)
        if not layers:
            raise SCAPError(f"the checkpoint has no tensor called {marker}, though it is to be quantized")
        for path in layers:
            refused = "heads" if find_role(path) == "head" else "experts" if "experts" in path.split(".") else None
            if refused is not None:
                raise SCAPError(f"layer {printable(path)}: under vLLM SCAP does not run {refused} of integer weights")
        return cls(config, layers)

    def renamed(self, names: Mapping[str, str]) -> "StoredLayers":
        """With other paths; those that are not named are left out."""
        return StoredLayers(
            self.config, {names[path]: tensors for path, tensors in self.layers.items() if path in names}
        )

    def holds(self, paths: Sequence[str]) -> bool:
        """Whether the layers `paths`, which vLLM joins, have integer weights.

        Raises:
            SCAPError: if some of them have and others have not.
        """
        integer = [path for path in paths if path in self.layers]
        if 0 < len(integer) < len(paths):
            other = next(path for path in paths if path not in self.layers)
            raise SCAPError(
                f"vLLM joins the layers {printable(integer[0])} and {printable(other)}, of which the first alone has "
                "integer weights: quantize both or neither"
            )
        return bool(integer)

    def storage(self, path: str, cut: Cut) -> Storage:
        """How the weights of the layer `path` are stored.

        Raises:
            SCAPError: naming the tensor that is wrong, or the layer that cannot be cut so.
        """
        shape = LayerShape(printable(path), cut.in_features, cut.out_features)
        storage = reader_for(self.config).storage(self.config, shape, self.layers[path], {})
        size = cut.in_features // storage.groups
        if storage.groups > 1 and (cut.first_in % size or cut.count_in % size):
            ranks = cut.in_features // cut.count_in
            raise SCAPError(
                f"layer {shape.path}: its {cut.in_features} input channels cannot be split over {ranks} ranks, "
                f"because {size} of them share a scale, and {cut.count_in} are no multiple of that; "
                "use fewer ranks, or quantize with a smaller group size"
            )
        return storage


def packed_shard(path: str, storage: Storage, tensors: Mapping[str, Tensor], cut: Cut) -> Weights:
    """What a rank holds of a layer, as the kernels read it.

    Args:
        path: of the layer, for messages.
        storage: from `StoredLayers.storage`.
        tensors: the checkpoint's, whole.
        cut: what is kept of them.

    Raises:
        SCAPError: naming the layer and the tensor that is wrong.
    """
    try:
        return find_format(f"int{storage.bits}").pack(cut_weights(storage.read(tensors), cut))
    except (ValueError, RuntimeError) as error:
        raise SCAPError(f"layer {printable(path)}: {first_line(error)}") from error


def cut_weights(weights: IntegerWeights, cut: Cut) -> IntegerWeights:
    """Some outputs and some inputs of a layer; the inputs are whole groups, or of one."""
    bits, integers, scales, zero_points = weights
    outputs = slice(cut.first_out, cut.first_out + cut.count_out)
    inputs = slice(cut.first_in, cut.first_in + cut.count_in)
    groups = slice(None)
    if scales.shape[1] > 1:
        size = weights.group_size
        groups = slice(cut.first_in // size, (cut.first_in + cut.count_in) // size)
    return IntegerWeights(
        bits,
        integers[outputs, inputs].contiguous(),
        scales[outputs, groups].contiguous(),
        None if zero_points is None else zero_points[outputs, groups].contiguous(),
    )
