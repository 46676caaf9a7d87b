"""The linear layers of vLLM that run a sparse checkpoint, over float and over integer weights."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, RowParallelLinear, UnquantizedLinearMethod

from ..errors import SCAPError, printable
from ..torch.quantized import Storage
from ..torch.weights import Weights, find_format
from .integer_operation import kind, served_integer_linear
from .operation import Biases, Part, fold, fold_sums, joined, merged, part_of, served_linear, spans_of
from .parts import LayerParts, part_number, ranks_of_outputs
from .stored import Cut, StoredLayers, packed_shard


class SCAPLinearMethod(UnquantizedLinearMethod):
    """A layer with float weights, of one or several of the checkpoint, some of which may be dense.

    Args:
        parts: what it is made of.
        decode_only: whether many rows are left dense.
        check: called when weights are loaded, by when all layers are made; raises if something is wrong with them.
    """

    supports_pre_processed_weights = False

    def __init__(self, parts: LayerParts, decode_only: bool, check: Callable[[], None]) -> None:
        super().__init__()
        self._layer_parts, self._decode_only, self._check = parts, decode_only, check

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        self._layer_parts.create(layer, input_size_per_partition, output_partition_sizes, input_size)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self._check()
        weight: Any = layer.weight
        if weight.is_cuda:  # the kernels read one input channel after the other
            weight.data = weight.data.t().contiguous().t()
        self._parts = merged(self._layer_parts.criteria(layer))
        bias, correction = _added_by_this_rank(layer, self._layer_parts)
        self._biases = fold(weight.data, self._parts, bias, correction)
        self._biases_without = fold(weight.data, self._parts, None, correction)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        biases = self._biases_without if bias is None else self._biases
        weight: Any = layer.weight
        return served_linear(x, weight, biases, self._parts, self._decode_only)


class _Run(NamedTuple):
    """Parts that one operation computes: the names of their tensors in the layer, and how these are read."""

    names: list[list[str]]
    format: str
    parts: list[Part]
    biases: Biases
    biases_without: Biases


class SCAPIntegerLinearMethod(LinearMethodBase):
    """A layer with integer weights, pruned or dense; see SCAPLinearMethod.

    Args:
        stored: the quantized layers of the checkpoint.
        paths: those of them that the layer is made of.
    """

    def __init__(
        self,
        parts: LayerParts,
        decode_only: bool,
        check: Callable[[], None],
        stored: StoredLayers,
        paths: Sequence[str],
    ) -> None:
        super().__init__()
        self._layer_parts, self._decode_only, self._check = parts, decode_only, check
        self._stored, self._paths = stored, paths

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self._layer_parts.create(layer, input_size_per_partition, output_partition_sizes, input_size)
        self._dtype = params_dtype
        splits_input = input_size_per_partition < input_size
        rank_of_layer: Any = layer.tp_rank
        ranks_of_layer: Any = layer.tp_size
        if len(output_partition_sizes) > len(self._paths) and ranks_of_layer > 1:
            raise SCAPError(
                f"layer {printable(self._paths[0])} is one in the checkpoint and several in vLLM: with integer "
                "weights it cannot be split over ranks"
            )
        self._loaders = []
        for number, (path, size) in enumerate(zip(self._paths, self._layer_parts.sizes, strict=True)):
            rank, ranks = (0, 1) if splits_input else ranks_of_outputs(layer, number)
            first_in = rank_of_layer * input_size_per_partition if splits_input else 0
            cut = Cut(input_size, size * ranks, first_in, input_size_per_partition, size * rank, size)
            self._loaders.append(_PartLoader(path, self._stored.storage(path, cut), cut))
        for name, found in {name: dtype for each in self._loaders for name, dtype in each.dtypes()}.items():
            # Nothing but a place to send a tensor to.
            place = nn.Parameter(torch.empty(0, dtype=found), requires_grad=False)
            place.weight_loader = self._load(name)  # type: ignore[attr-defined]
            layer.register_parameter(name, place)

    def _load(self, name: str) -> Callable[..., None]:
        def load(place: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
            self._loaders[part_number(shard)].take(name, loaded, place.device)

        return load

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self._check()
        packed = [loader.packed() for loader in self._loaders]
        for name in {name for loader in self._loaders for name, _ in loader.dtypes()}:
            delattr(layer, name)
        del self._loaders
        bias, correction = _added_by_this_rank(layer, self._layer_parts)
        parts = zip(self._layer_parts.criteria(layer), spans_of(self._layer_parts.sizes), packed, strict=True)
        self._runs = []
        for _, together in groupby(parts, lambda part: kind(part[2])):
            criteria, spans, weights = (list(values) for values in zip(*together, strict=True))
            span = slice(spans[0].start, spans[-1].stop)

            def row_sums(weights: Sequence[Weights] = weights) -> Tensor:
                return torch.cat([find_format(each.format).row_sums(each.tensors) for each in weights])

            folded = [
                fold_sums(row_sums, self._dtype, criteria, part_of(each, span), part_of(correction, span))
                for each in (bias, None)
            ]
            names = [self._register(layer, each) for each in weights]
            self._runs.append(_Run(names, weights[0].format, criteria, *folded))

    def _register(self, layer: nn.Module, weights: Weights) -> list[str]:
        """Has the layer hold the tensors; their names."""
        first = sum(name.startswith("scap_packed_") for name, _ in layer.named_buffers(recurse=False))
        names = [f"scap_packed_{first + number}" for number in range(len(weights.tensors))]
        for name, tensor in zip(names, weights.tensors, strict=True):
            layer.register_buffer(name, tensor, persistent=False)
        return names

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        outputs = []
        for names, format, parts, with_bias, without in self._runs:
            weights = [Weights(format, tuple(getattr(layer, name) for name in each)) for each in names]
            biases = without if bias is None else with_bias
            outputs.append(served_integer_linear(x, weights, biases, parts, self._decode_only))
        return joined(outputs)


class _PartLoader:
    """Packs what a rank has of a layer of the checkpoint as soon as all tensors are there, and frees these."""

    def __init__(self, path: str, storage: Storage, cut: Cut) -> None:
        self._path, self._storage, self._cut = path, storage, cut
        self._tensors: dict[str, Tensor] = {}
        self._packed: Weights | None = None

    def dtypes(self) -> list[tuple[str, torch.dtype]]:
        """The tensors that the checkpoint has of the layer."""
        return [(name, tensor.dtype) for name, tensor in self._storage.tensors.items()]

    def take(self, name: str, tensor: Tensor, device: torch.device) -> None:
        """Of the checkpoint, whole."""
        self._tensors[name] = tensor.to(device)
        if self._tensors.keys() >= self._storage.tensors.keys():
            self._packed = packed_shard(self._path, self._storage, self._tensors, self._cut)
            self._tensors = {}

    def packed(self) -> Weights:
        """The weights.

        Raises:
            SCAPError: naming a tensor that was not loaded.
        """
        if self._packed is None:
            lost = sorted(self._storage.tensors.keys() - self._tensors.keys())
            raise SCAPError(f"layer {printable(self._path)}: {', '.join(lost)} missing from what vLLM loaded")
        return self._packed


def _added_by_this_rank(layer: Any, parts: LayerParts) -> tuple[Tensor | None, Tensor | None]:
    """Bias and correction; where outputs are summed over ranks, the first of them adds both."""
    if isinstance(layer, RowParallelLinear) and layer.tp_rank > 0:
        return None, None
    bias = getattr(layer, "bias", None)
    return None if bias is None else bias.data, parts.correction(layer)
