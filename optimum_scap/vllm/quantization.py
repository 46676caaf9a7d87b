"""What vLLM calls: the quantization config of a sparse checkpoint, and its linear layers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from ..core.parameters import QUANT_METHOD, LayerParameters, SCAPParameters
from ..errors import SCAPError, printable
from ..torch.linear import VECTORS
from .operation import Part, fold, merged, served_linear
from .plan import check_all_found, layers_within, paths_within, served_parameters


_SHARDS = {"q": 0, "k": 1, "v": 2}


@register_quantization_config(QUANT_METHOD)
class SCAPvLLMConfig(QuantizationConfig):
    """The parameters of a sparse checkpoint, by vLLM's names of its layers."""

    def __init__(self, parameters: SCAPParameters) -> None:
        super().__init__()
        self.parameters = parameters
        self.found: set[str] = set()

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SCAPvLLMConfig":
        return cls(served_parameters(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        # Layers that vLLM joins are found by what they are joined from.
        mapper = replace(hf_to_vllm_mapper, orig_to_new_stacked={})
        names = {path: mapper.map_name(f"{path}.weight") for path in self.parameters.layers}
        self.parameters = self.parameters.renamed(
            {path: name.removesuffix(".weight") for path, name in names.items() if name is not None}
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> UnquantizedLinearMethod | None:
        if not isinstance(layer, LinearBase):
            return None  # vLLM's own for embeddings, attention, experts and heads, which are not pruned
        if get_current_vllm_config().lora_config is not None:
            raise SCAPError(
                "LoRA adapters cannot be served over a checkpoint with activation sparsity: leave out LoRA"
            )
        layers = layers_within(self.parameters, prefix, self.packed_modules_mapping)
        if layers is None:
            return UnquantizedLinearMethod()
        self.found.update(paths_within(prefix, self.packed_modules_mapping))
        return SCAPLinearMethod(self, prefix, layers)


class SCAPLinearMethod(UnquantizedLinearMethod):
    """A linear layer of vLLM, of one or several of the checkpoint, some of which may be dense."""

    supports_pre_processed_weights = False

    def __init__(self, config: SCAPvLLMConfig, prefix: str, layers: list[LayerParameters | None]) -> None:
        super().__init__()
        self._config = config
        self._prefix = prefix
        self._layers = layers
        self._decode_only = config.parameters.apply_to == "decode"

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
        sizes = list(output_partition_sizes)
        if len(self._layers) == 1:
            sizes = [sum(sizes)]
        if len(sizes) != len(self._layers):
            raise SCAPError(
                f"vLLM's layer {printable(self._prefix)} is not made of the checkpoint's layers one by one"
            )
        self._sizes = sizes
        shapes = {"scale": (len(sizes), input_size_per_partition), "bias_correction": (sum(sizes),)}
        for name, shape in shapes.items():
            if any(name in found.tensors for found in self._present()):
                # NaN until it is loaded.
                vector = nn.Parameter(torch.full(shape, torch.nan, dtype=torch.float32), requires_grad=False)
                vector.weight_loader = _VectorLoader(layer, name, sizes, input_size_per_partition < input_size)  # type: ignore[attr-defined]
                layer.register_parameter(VECTORS[name], vector)

    def _present(self) -> list[LayerParameters]:
        return [found for found in self._layers if found is not None]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if get_pp_group().world_size == 1:
            check_all_found(self._config.parameters, self._config.found)
        weight: Any = layer.weight
        if weight.is_cuda:  # the kernels read one input channel after the other
            weight.data = weight.data.t().contiguous().t()
        parts = [self._part(layer, number) for number in range(len(self._sizes))]
        self._parts = merged(parts)
        adds = not (isinstance(layer, RowParallelLinear) and layer.tp_rank > 0)
        correction = self._correction(layer) if adds else None
        bias: Any = layer.bias if adds else None
        self._biases = fold(weight.data, parts, None if bias is None else bias.data, correction)
        self._biases_without = fold(weight.data, parts, None, correction)

    def _part(self, layer: Any, number: int) -> Part:
        found, size = self._layers[number], self._sizes[number]
        if found is None:
            return Part(size)
        scale = None
        if "scale" in found.tensors:
            scale = layer.scap_scale.data[number].contiguous()
            self._check_loaded(scale, "scale")
        return Part(size, found.threshold, found.mode, scale)

    def _correction(self, layer: Any) -> Tensor | None:
        if not any("bias_correction" in found.tensors for found in self._present()):
            return None
        correction = layer.scap_bias_correction.data.clone()
        for found, part in zip(self._layers, correction.split(self._sizes), strict=True):
            if found is None or "bias_correction" not in found.tensors:
                part.zero_()
            else:
                self._check_loaded(part, "bias_correction")
        return correction

    def _check_loaded(self, vector: Tensor, name: str) -> None:
        if not torch.isfinite(vector).all():
            raise SCAPError(
                f"layer {printable(self._prefix)}: its {name} is missing from the checkpoint, or not finite"
            )

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        biases = self._biases_without if bias is None else self._biases
        weight: Any = layer.weight
        return served_linear(x, weight, biases, self._parts, self._decode_only)


class _VectorLoader:
    """Puts a vector of the checkpoint, or a rank's shard of it, where vLLM's layer has it."""

    def __init__(self, layer: nn.Module, name: str, sizes: Sequence[int], splits_input: bool) -> None:
        self._layer: Any = layer
        self._name = name
        self._sizes = sizes
        self._splits_input = splits_input

    def __call__(self, parameter: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
        number = _SHARDS[shard] if isinstance(shard, str) else shard or 0
        if shard is None and len(self._sizes) > 1:
            raise SCAPError(f"a {self._name} of a layer that the checkpoint has in one piece and vLLM in several")
        rank = self._layer.tp_rank
        if self._name == "scale":
            target = parameter.data[number]
            start = rank * len(target) if self._splits_input else 0
        else:
            target = parameter.data.split(list(self._sizes))[number]
            if shard in ("k", "v"):
                rank //= self._layer.num_kv_head_replicas
            is_split = self._layer.tp_size > 1 and loaded.numel() > len(target)
            start = rank * len(target) if is_split else 0
        if loaded.dim() != 1 or start + len(target) > len(loaded):
            raise SCAPError(f"a {self._name} of {loaded.numel()} values, where {len(target)} per rank are needed")
        target.copy_(loaded[start : start + len(target)])
