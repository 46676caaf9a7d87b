"""What all kinds of fused blocks share: a layer ready to be replaced, and its replacement."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import openvino as ov

from ..extension.packing import BufferPool, PackedLayer
from ..graph import FullyConnected, evaluate_constant, evaluate_weights, is_constant
from ..mapped_files import MappedFiles
from ..threshold_ops import ThresholdOps
from ..weights import UnsupportedWeightsError, pack_weights


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workshop:
    """What it takes to make operations: the compiled extension, how they compute, and memory for packed weights."""

    library: Path
    precision: str
    pool: BufferPool
    files: MappedFiles
    activation_group_size: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that all operations take."""
        return {
            "precision": self.precision,
            "activation_group_size": self.activation_group_size,
            "library": self.library,
        }

    def pack(self, layer: FullyConnected, bias: np.ndarray | None) -> PackedLayer:
        """The weights and the bias of `layer` as the operations read them.

        Raises:
            UnsupportedWeightsError: if they cannot.
        """
        return pack_weights(layer, bias, library=self.library, pool=self.pool, files=self.files)


@dataclass(frozen=True)
class FusedLayer:
    """One pruned layer ready to be replaced: its packed weights with its bias, and the output that it stands for."""

    ops: ThresholdOps
    packed: PackedLayer
    output: ov.Output

    @property
    def path(self) -> str:
        return self.ops.layer.path


# Layers over one thresholded input.
Group = list[FusedLayer]


class BlockKind(Protocol):
    """A kind of block: what it matches among the groups of ready layers, and the operation that takes its place.

    Kinds are asked in the order of `fuse.KINDS`; each gets the groups that the ones before it left.
    """

    def __call__(self, groups: list[Group], workshop: Workshop) -> tuple[list[str], list[Group]]:
        """Replaces every block of this kind; the module paths of its layers, and the groups that are left."""
        ...


def prepare(ops: ThresholdOps, workshop: Workshop) -> FusedLayer:
    """A pruned layer, ready to be replaced.

    Raises:
        UnsupportedWeightsError: if the operations cannot compute it, saying why.
    """
    layer = ops.layer
    mode, threshold = ops.criterion.mode, ops.criterion.threshold
    if not (np.isfinite(mode) and np.isfinite(threshold) and threshold >= 0):
        raise UnsupportedWeightsError(f"mode {mode} and threshold {threshold}")
    if layer.quantizers:
        raise UnsupportedWeightsError("quantized activations")
    if ops.source.get_element_type() != ov.Type.f32 or layer.node.get_output_element_type(0) != ov.Type.f32:
        raise UnsupportedWeightsError(f"activations of type {ops.source.get_element_type().get_type_name()}")
    # What is pruned becomes the mode, where the operation makes it zero.
    output, bias = output_and_bias(layer, 0.0 if ops.centered else float(ops.criterion.mode))
    return FusedLayer(ops, workshop.pack(layer, bias), output)


def output_and_bias(layer: FullyConnected, offset: float = 0.0) -> tuple[ov.Output, np.ndarray | None]:
    """The output behind the layer's constant bias, and everything that is added to it: float32 `[out]` or None.

    `offset` is what the layer's activations are more than what the operation multiplies.
    """
    output = layer.node.output(0)
    bias = np.zeros(layer.out_features, dtype=np.float64)
    if offset != 0:
        bias += offset * evaluate_weights(layer).sum(axis=1, dtype=np.float64)
    while True:
        readers = list(output.get_target_inputs())
        if len(readers) != 1 or readers[0].get_node().get_type_name() != "Add":
            break
        add = readers[0].get_node()
        other = add.input_value(1 - readers[0].get_index())
        if not is_constant(other):
            break
        value = evaluate_constant(other)
        if value.size not in (1, layer.out_features) or (value.ndim and value.shape[-1] != value.size):
            break
        bias += value.reshape(-1)
        output = add.output(0)
    return output, bias.astype(np.float32) if bias.any() else None


def redirect(old: ov.Output, new: ov.Output) -> None:
    """Has everything that reads `old` read `new`."""
    readers: Iterable[ov.Input] = list(old.get_target_inputs())
    names = old.get_names()
    for reader in readers:
        reader.replace_source_output(new)
    if names:
        new.add_names(names)
