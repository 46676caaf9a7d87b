"""Runs an `ov.Model` over calibration samples and hands out values from inside it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import openvino as ov
from nncf.definitions import NNCF_DATASET_RESET_STATE_KEY
from openvino import opset13 as opset

from ..data.samples import as_array, describe_sample, inputs_of
from ..errors import SCAPError, first_line, printable


# Everything that OpenVINO approximates by default is turned off: thresholds belong to the model, not to one CPU.
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "KV_CACHE_PRECISION": "f32",
    "PERFORMANCE_HINT": "LATENCY",
}


def model_with_outputs(model: ov.Model, outputs: Sequence[ov.Output], extra: Sequence[ov.Node] = ()) -> ov.Model:
    """A model that computes `outputs` of `model` and nothing that only its own outputs need.

    `extra` are parameters that the outputs read besides the model's own.
    """
    results = [opset.result(output) for output in outputs]
    parameters = [*model.get_parameters(), *extra]
    return ov.Model(results, model.get_sinks(), parameters, model.get_variables(), model.get_friendly_name())


class Runner:
    """A compiled model that is fed one calibration sample at a time.

    Args:
        model: the model to compile on the CPU.
        fixed_inputs: values of inputs that are the same for every sample, by input name.
    """

    def __init__(self, model: ov.Model, fixed_inputs: dict[str, np.ndarray] | None = None) -> None:
        self._compiled = ov.Core().compile_model(model, "CPU", EXACT)
        self._request = self._compiled.create_infer_request()
        self._stateful = bool(model.get_sinks())
        self._fixed = fixed_inputs or {}
        self._names = {name for port in self._compiled.inputs for name in port.get_names()}

    def set_fixed_inputs(self, values: dict[str, np.ndarray]) -> None:
        self._fixed = values

    def inputs_by_name(self, sample: Any) -> dict[str, Any]:
        """What `sample` gives the model: inputs by name, inputs in order, or the one input.

        Raises:
            SCAPError: if it is not what the model needs.
        """
        inputs = inputs_of(sample)
        if isinstance(inputs, dict):
            missing = [
                port.get_any_name()
                for port in self._compiled.inputs
                if not port.get_names() & (inputs.keys() | self._fixed.keys())
            ]
            if missing:
                raise SCAPError(
                    f"calibration sample lacks the model inputs {', '.join(missing)}; it has "
                    f"{printable(', '.join(map(str, inputs))) or 'nothing'}"
                )
            return inputs
        free = [port for port in self._compiled.inputs if not port.get_names() & self._fixed.keys()]
        if len(inputs) != len(free):
            raise SCAPError(
                f"calibration sample {describe_sample(sample)} has {len(inputs)} inputs, the model has {len(free)}"
            )
        return {port.get_any_name(): value for port, value in zip(free, inputs, strict=True)}

    def __call__(self, inputs: Mapping[str, Any]) -> list[np.ndarray]:
        """The outputs of the model for inputs by name; those that the model does not have are left out.

        Raises:
            SCAPError: if the model cannot run on them.
        """
        # NNCF's mark on a sample that continues the one before it.
        if self._stateful and inputs.get(NNCF_DATASET_RESET_STATE_KEY) is not False:
            self._request.reset_state()
        try:
            arrays = {name: _tensor(value) for name, value in inputs.items() if name in self._names}
            results = self._request.infer({**arrays, **self._fixed}, share_inputs=True, share_outputs=True)
        except (RuntimeError, TypeError, ValueError) as error:
            raise SCAPError(
                f"the model cannot run on the calibration sample {describe_sample(inputs)}: {first_line(error)}"
            ) from error
        return [results[index] for index in range(len(self._compiled.outputs))]


def _tensor(value: Any) -> Any:
    """`value` for OpenVINO, which reads its own tensors, whatever their type, and arrays."""
    return value if isinstance(value, ov.Tensor) else as_array(value)
