"""Statistical Calibrated Activation Pruning (SCAP, arXiv 2412.07174) for PyTorch and OpenVINO models.

Importing this package imports neither torch nor openvino nor nncf: public names are resolved on first use.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .registration import register_with_transformers


try:
    __version__ = version("optimum-scap")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"

_PUBLIC_NAMES = {
    "OVModelForCausalLM": ".openvino.modeling",
    "OVModelForFeatureExtraction": ".openvino.modeling",
    "OVModelForImageClassification": ".openvino.modeling",
    "OVModelForMaskedLM": ".openvino.modeling",
    "OVModelForQuestionAnswering": ".openvino.modeling",
    "OVModelForSeq2SeqLM": ".openvino.modeling",
    "OVModelForSequenceClassification": ".openvino.modeling",
    "OVModelForTokenClassification": ".openvino.modeling",
    "RoleTarget": ".core.config",
    "Target": ".core.config",
    "SCAPConfig": ".core.config",
    "SCAPError": ".errors",
    "SCAPParameters": ".core.parameters",
    "load_parameters": ".core.parameter_files",
    "save_parameters": ".core.parameter_files",
    "sparsify_activations": ".sparsify",
}

__all__ = [
    "OVModelForCausalLM",
    "OVModelForFeatureExtraction",
    "OVModelForImageClassification",
    "OVModelForMaskedLM",
    "OVModelForQuestionAnswering",
    "OVModelForSeq2SeqLM",
    "OVModelForSequenceClassification",
    "OVModelForTokenClassification",
    "RoleTarget",
    "SCAPConfig",
    "SCAPError",
    "SCAPParameters",
    "Target",
    "__version__",
    "load_parameters",
    "save_parameters",
    "sparsify_activations",
]

if TYPE_CHECKING:
    from .core.config import RoleTarget, SCAPConfig, Target
    from .core.parameter_files import load_parameters, save_parameters
    from .core.parameters import SCAPParameters
    from .errors import SCAPError
    from .openvino.modeling import (
        OVModelForCausalLM,
        OVModelForFeatureExtraction,
        OVModelForImageClassification,
        OVModelForMaskedLM,
        OVModelForQuestionAnswering,
        OVModelForSeq2SeqLM,
        OVModelForSequenceClassification,
        OVModelForTokenClassification,
    )
    from .sparsify import sparsify_activations


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC_NAMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_with_transformers()
