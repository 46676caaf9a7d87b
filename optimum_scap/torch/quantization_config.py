"""The `quantization_config` of a sparse checkpoint, and how a model in memory gets one."""

from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..core.parameter_files import parameters_from_quantization_config
from ..core.parameters import QUANT_METHOD, SCAPParameters


class SCAPQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of a sparse checkpoint: the SCAPParameters and the name of the method.

    Args:
        parameters: the parameters, or None if they are given by `fields`.
        fields: the fields of SCAPParameters as config.json holds them; or `quantization_config` alone, that of a
            quantized checkpoint which is to be read without pruning it.

    Raises:
        SCAPError: naming the field that is wrong.
    """

    quant_method: Any = QUANT_METHOD

    def __init__(self, parameters: SCAPParameters | None = None, **fields: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.parameters: SCAPParameters | None = None
        self.source: dict[str, Any] | None = None
        if parameters is None and fields.keys() - {"quant_method"} == {"quantization_config"}:
            self.source = fields["quantization_config"]
            return
        if parameters is None:
            parameters = parameters_from_quantization_config(fields, "quantization_config in config.json")
        self.parameters = parameters
        self.source = parameters.quantization_config

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "SCAPQuantizationConfig":
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        if self.parameters is None:
            return {"quant_method": QUANT_METHOD, "quantization_config": self.source}
        return {"quant_method": QUANT_METHOD, **self.parameters.model_dump(mode="json")}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def mark_as_float(model: nn.Module) -> None:
    """The weights are ordinary floats: `half()`, `float()` and training are not to be refused."""
    model.is_quantized = False  # type: ignore[assignment]
