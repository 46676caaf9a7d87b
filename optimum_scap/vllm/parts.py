"""The parts of one of vLLM's layers: which of the checkpoint's layers it is made of, and their criteria."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.parameters import LayerParameters
from ..errors import SCAPError, printable
from ..torch.linear import VECTORS
from .operation import Part


_SHARDS = {"q": 0, "k": 1, "v": 2}


class LayerParts:
    """What vLLM joins in a layer, each with a criterion of its own or none.

    Args:
        prefix: vLLM's path of the layer.
        layers: the parameters of each of the checkpoint's layers that it is made of; None for one that is dense.
    """

    sizes: list[int]

    def __init__(self, prefix: str, layers: Sequence[LayerParameters | None]) -> None:
        self.prefix = prefix
        self._layers = layers

    def create(
        self, layer: nn.Module, input_size_per_partition: int, output_partition_sizes: Sequence[int], input_size: int
    ) -> None:
        """Makes what the checkpoint has of vectors per channel; called when vLLM creates weights."""
        sizes = list(output_partition_sizes)
        if len(self._layers) == 1:
            sizes = [sum(sizes)]
        if len(sizes) != len(self._layers):
            raise SCAPError(f"vLLM's layer {printable(self.prefix)} is not made of the checkpoint's layers one by one")
        self.sizes = sizes
        shapes = {"scale": (len(sizes), input_size_per_partition), "bias_correction": (sum(sizes),)}
        for name, shape in shapes.items():
            if any(name in found.tensors for found in self._layers if found is not None):
                # NaN until it is loaded.
                vector = nn.Parameter(torch.full(shape, torch.nan, dtype=torch.float32), requires_grad=False)
                vector.weight_loader = _VectorLoader(layer, name, sizes, input_size_per_partition < input_size)  # type: ignore[attr-defined]
                layer.register_parameter(VECTORS[name], vector)

    def criteria(self, layer: Any) -> list[Part]:
        """Of each part, once vectors are loaded."""
        return [self._part(layer, number) for number in range(len(self.sizes))]

    def _part(self, layer: Any, number: int) -> Part:
        found, size = self._layers[number], self.sizes[number]
        if found is None:
            return Part(size)
        scale = None
        if "scale" in found.tensors:
            scale = layer.scap_scale.data[number].contiguous()
            self._check_loaded(scale, "scale")
        return Part(size, found.threshold, found.mode, scale)

    def correction(self, layer: Any) -> Tensor | None:
        """The bias corrections of all parts, `[out_features]`."""
        if not any("bias_correction" in found.tensors for found in self._layers if found is not None):
            return None
        correction = layer.scap_bias_correction.data.clone()
        for found, part in zip(self._layers, correction.split(self.sizes), strict=True):
            if found is None or "bias_correction" not in found.tensors:
                part.zero_()
            else:
                self._check_loaded(part, "bias_correction")
        return correction

    def _check_loaded(self, vector: Tensor, name: str) -> None:
        if not torch.isfinite(vector).all():
            raise SCAPError(
                f"layer {printable(self.prefix)}: its {name} is missing from the checkpoint, or not finite"
            )


def part_number(shard: str | int | None) -> int:
    """Which part vLLM loads: it calls q, k and v by letter, others by number, and what is not joined None."""
    return _SHARDS[shard] if isinstance(shard, str) else shard or 0


def ranks_of_outputs(layer: Any, number: int) -> tuple[int, int]:
    """Which of how many shards of its outputs a rank has of a part, where outputs are split; k and v may be shared."""
    replicas = getattr(layer, "num_kv_head_replicas", 1) if number in (_SHARDS["k"], _SHARDS["v"]) else 1
    return layer.tp_rank // replicas, layer.tp_size // replicas


class _VectorLoader:
    """Puts a vector of the checkpoint, or a rank's shard of it, where vLLM's layer has it."""

    def __init__(self, layer: nn.Module, name: str, sizes: Sequence[int], splits_input: bool) -> None:
        self._layer: Any = layer
        self._name = name
        self._sizes = sizes
        self._splits_input = splits_input

    def __call__(self, parameter: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
        number = part_number(shard)
        if shard is None and len(self._sizes) > 1:
            raise SCAPError(f"a {self._name} of a layer that the checkpoint has in one piece and vLLM in several")
        rank = self._layer.tp_rank
        if self._name == "scale":
            target = parameter.data[number]
            start = rank * len(target) if self._splits_input else 0
        else:
            target = parameter.data.split(list(self._sizes))[number]
            if isinstance(shard, str):
                rank, _ = ranks_of_outputs(self._layer, number)
            is_split = self._layer.tp_size > 1 and loaded.numel() > len(target)
            start = rank * len(target) if is_split else 0
        if loaded.dim() != 1 or start + len(target) > len(loaded):
            raise SCAPError(f"a {self._name} of {loaded.numel()} values, where {len(target)} per rank are needed")
        target.copy_(loaded[start : start + len(target)])
