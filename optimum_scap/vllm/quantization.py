"""What vLLM calls: the quantization config of a sparse checkpoint, which says how each layer is run."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from ..core.parameters import QUANT_METHOD, SCAPParameters
from ..errors import SCAPError, printable
from ..torch.quantized import StoredTensor
from ..torch.readers import torch_dtype
from .layers import SCAPIntegerLinearMethod, SCAPLinearMethod
from .parts import LayerParts
from .plan import check_all_found, layers_within, paths_within, served_parameters
from .stored import StoredLayers


@register_quantization_config(QUANT_METHOD)
class SCAPvLLMConfig(QuantizationConfig):
    """The parameters of a sparse checkpoint, by vLLM's names of its layers."""

    def __init__(self, parameters: SCAPParameters) -> None:
        super().__init__()
        self.parameters = parameters
        self.stored: StoredLayers | None = None
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

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        # Called before layers are made. What there is of integer weights stands in the headers of the files.
        if self.parameters.quantization_config is None:
            return
        headers = get_safetensors_params_metadata(model_name, revision=revision)
        headers.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(tuple(found["shape"]), torch_dtype(found["dtype"])) for name, found in headers.items()
        }
        self.stored = StoredLayers.found(self.parameters.quantization_config, tensors)

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        # vLLM's own drops the g_idx of GPTQ, which says whether the order of channels matters.
        return WeightsMapper()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        # Layers that vLLM joins are found by what they are joined from.
        mapper = replace(hf_to_vllm_mapper, orig_to_new_stacked={})
        paths = {*self.parameters.layers, *(self.stored.layers if self.stored is not None else ())}
        names = {path: mapper.map_name(f"{path}.weight") for path in paths}
        renamed = {path: name.removesuffix(".weight") for path, name in names.items() if name is not None}
        self.parameters = self.parameters.renamed(renamed)
        if self.stored is not None:
            self.stored = self.stored.renamed(renamed)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        if not isinstance(layer, LinearBase):
            if self.stored is not None and prefix in self.stored.layers:
                raise SCAPError(
                    f"layer {printable(prefix)}: under vLLM SCAP runs no {type(layer).__name__} of integers"
                )
            return None  # vLLM's own for embeddings, attention, experts and heads, which are not pruned
        if get_current_vllm_config().lora_config is not None:
            raise SCAPError(
                "LoRA adapters cannot be served over a checkpoint with activation sparsity: leave out LoRA"
            )
        paths = paths_within(prefix, self.packed_modules_mapping)
        layers = layers_within(self.parameters, prefix, self.packed_modules_mapping)
        is_integer = self.stored is not None and self.stored.holds(paths)
        if layers is None and not is_integer:
            return UnquantizedLinearMethod()
        self.found.update(paths)
        parts = LayerParts(prefix, layers or [None] * len(paths))
        decode_only = self.parameters.apply_to == "decode"
        if is_integer:
            assert self.stored is not None
            return SCAPIntegerLinearMethod(parts, decode_only, self._check_all_found, self.stored, paths)
        return SCAPLinearMethod(parts, decode_only, self._check_all_found)

    def _check_all_found(self) -> None:
        if get_pp_group().world_size == 1:  # else a rank has some of the layers
            check_all_found(self.parameters, self.found)
