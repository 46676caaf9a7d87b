"""Sparse checkpoints through transformers' quantizer registry: `quant_method: "scap"` in config.json.

The weights of a checkpoint are those of the dense model, by the same names and in the same layout, with vectors per
channel beside them where there are any; modes and thresholds are part of config.json. A loader that does not know the
method ignores it and gets the dense model. The weights of a model that was quantized before are those of its own
checkpoint as well, and its `quantization_config` is part of ours.
"""

import logging
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from ..core.parameters import QUANT_METHOD, SCAPParameters
from .apply import apply_parameters, mark_tied, pruned_layers
from .linear import VECTORS
from .quantization_config import SCAPQuantizationConfig, mark_as_float
from .readers import kept_metadata, pack_model, prepare_model


class SCAPQuantizer(HfQuantizer):
    """Makes the layers of a model prune their inputs before its weights are loaded."""

    quantization_config: SCAPQuantizationConfig

    def _process_model_before_weight_loading(
        self, model: nn.Module, dtype: Any = None, checkpoint_files: Any = None, **_kwargs: Any
    ) -> nn.Module:
        config = self.quantization_config
        if config.source is not None:
            prepare_model(model, config.source, checkpoint_files or (), dtype or torch.get_default_dtype())
        if config.parameters is not None:
            apply_parameters(model, config.parameters, from_checkpoint=True)
        kept: Any = getattr(model, "_keep_in_fp32_modules_strict", None)
        model._keep_in_fp32_modules_strict = {*(kept or ()), *VECTORS.values()}  # type: ignore[assignment]
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_kwargs: Any) -> nn.Module:
        config = self.quantization_config
        pack_model(model)
        layers = pruned_layers(model).values()
        mark_tied(model, layers)
        for module in layers:
            module.prepare()  # type: ignore[operator]
        mark_as_float(model)
        # With it save_pretrained would ignore the state_dict that it is given, as FSDP and DeepSpeed give it.
        model.hf_quantizer = self if kept_metadata(model) else None  # type: ignore[assignment]
        if config.parameters is None:  # it is what its checkpoint says
            model.config.quantization_config = config.source  # type: ignore[union-attr]
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any] | None, dict[str, str]]:
        metadata = dict(kept_metadata(model))
        return (model.state_dict() if metadata else None), metadata

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: Any, parameters: SCAPParameters) -> None:
    """Gives a transformers model that was sparsified in memory what `from_pretrained` gives one that is loaded."""
    model.config.quantization_config = config = SCAPQuantizationConfig(parameters)
    model.quantization_method = QUANT_METHOD
    if kept_metadata(model):
        model.hf_quantizer = SCAPQuantizer(config)
    elif getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
    mark_as_float(model)


def register() -> None:
    """Makes transformers know the method; calling it again is harmless."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        # OpenVINO's converter patches models of the quantization methods it knows, and warns of any other.
        logging.getLogger("openvino.frontend.pytorch.ts_decoder").addFilter(_is_not_about_us)
        register_quantization_config(QUANT_METHOD)(SCAPQuantizationConfig)
        register_quantizer(QUANT_METHOD)(SCAPQuantizer)


def _is_not_about_us(record: logging.LogRecord) -> bool:
    return record.exc_info is None or f"quantization type: {QUANT_METHOD}" not in str(record.exc_info[1])
