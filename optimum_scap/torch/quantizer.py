"""Sparse checkpoints through transformers' quantizer registry: `quant_method: "scap"` in config.json.

The weights of a checkpoint are those of the dense model, by the same names and in the same layout; modes and
thresholds are part of config.json. A loader that does not know the method ignores it and gets the dense model.
"""

import logging
from typing import Any

from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..core.parameters import QUANT_METHOD, SCAPParameters, parameters_from_quantization_config


class SCAPQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of a sparse checkpoint: the SCAPParameters and the name of the method.

    Args:
        parameters: the parameters, or None if they are given by `fields`.
        fields: the fields of SCAPParameters as config.json holds them.

    Raises:
        SCAPError: naming the field that is wrong.
    """

    quant_method: Any = QUANT_METHOD

    def __init__(self, parameters: SCAPParameters | None = None, **fields: Any) -> None:
        self.quant_method = QUANT_METHOD
        if parameters is None:
            parameters = parameters_from_quantization_config(fields, "quantization_config in config.json")
        self.parameters = parameters

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "SCAPQuantizationConfig":
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": QUANT_METHOD, **self.parameters.model_dump(mode="json")}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class SCAPQuantizer(HfQuantizer):
    """Makes the layers of a model prune their inputs before its weights are loaded."""

    quantization_config: SCAPQuantizationConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **_kwargs: Any) -> nn.Module:
        from .backend import apply_parameters

        apply_parameters(model, self.quantization_config.parameters)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_kwargs: Any) -> nn.Module:
        from .backend import pruned_layers

        for module in pruned_layers(model).values():
            module.prepare()  # type: ignore[operator]
        _mark_as_float(model)
        # With it save_pretrained would ignore the state_dict that it is given, as FSDP and DeepSpeed give it.
        model.hf_quantizer = None  # type: ignore[assignment]
        return model

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach_quantizer(model: nn.Module, parameters: SCAPParameters) -> None:
    """Gives a model that was sparsified in memory what `from_pretrained` gives one that is loaded."""
    register()
    config = SCAPQuantizationConfig(parameters)
    model.config.quantization_config = config  # type: ignore[union-attr]
    model.quantization_method = QUANT_METHOD  # type: ignore[assignment]
    _mark_as_float(model)


def register() -> None:
    """Makes transformers know the method; calling it again is harmless."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        # OpenVINO's converter patches models of the quantization methods it knows, and warns of any other.
        logging.getLogger("openvino.frontend.pytorch.ts_decoder").addFilter(_is_not_about_us)
        register_quantization_config(QUANT_METHOD)(SCAPQuantizationConfig)
        register_quantizer(QUANT_METHOD)(SCAPQuantizer)


def _is_not_about_us(record: logging.LogRecord) -> bool:
    return record.exc_info is None or f"quantization type: {QUANT_METHOD}" not in str(record.exc_info[1])


def _mark_as_float(model: nn.Module) -> None:
    """The weights are ordinary floats: `half()`, `float()` and training are not to be refused."""
    model.is_quantized = False  # type: ignore[assignment]
