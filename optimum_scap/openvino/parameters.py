"""The parameters that a sparse `ov.Model` carries."""

import openvino as ov

from ..core.parameter_files import parameters_from_json
from ..core.parameters import SCAPParameters
from .threshold_ops import read_tensors


# Where they are in the model's rt_info, as JSON.
RT_INFO = ["optimum_scap", "parameters"]


def read_parameters(model: ov.Model) -> SCAPParameters | None:
    """The SCAP parameters that `model` carries, None if it carries none.

    Raises:
        SCAPError: if what it carries cannot be read.
    """
    if not model.has_rt_info(RT_INFO):
        return None
    found = parameters_from_json(model.get_rt_info(RT_INFO).astype(str), "the model's SCAP parameters")
    has_tensors = any(layer.tensors for layer in found.layers.values())
    return found.with_named_tensors(read_tensors(model)) if has_tensors else found
