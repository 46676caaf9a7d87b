"""Runs an `ov.Model` over calibration samples and hands out values from inside it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov
from nncf.definitions import NNCF_DATASET_RESET_STATE_KEY
from openvino import opset13 as opset

from ..errors import SCAPError


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

    def __call__(self, sample: Any) -> list[np.ndarray]:
        """The outputs of the model for `sample`: a dict by input name, or the inputs in order."""
        continues = False
        if isinstance(sample, dict):
            # NNCF's mark on a sample that continues the one before it.
            continues = sample.get(NNCF_DATASET_RESET_STATE_KEY) is False
            inputs: Any = {name: value for name, value in sample.items() if name in self._names}
            missing = self._names_missing(inputs)
            if missing:
                raise SCAPError(
                    f"calibration sample lacks the model inputs {', '.join(missing)}; it has "
                    f"{', '.join(map(str, sample)) or 'nothing'}"
                )
        else:
            values = sample if isinstance(sample, list | tuple) else [sample]
            free = [port for port in self._compiled.inputs if not port.get_names() & self._fixed.keys()]
            if len(values) != len(free):
                raise SCAPError(f"calibration sample has {len(values)} inputs, the model has {len(free)}")
            inputs = {port.get_any_name(): value for port, value in zip(free, values, strict=True)}
        if self._stateful and not continues:
            self._request.reset_state()
        results = self._request.infer({**inputs, **self._fixed}, share_inputs=True, share_outputs=True)
        return [results[index] for index in range(len(self._compiled.outputs))]

    def _names_missing(self, inputs: dict[str, Any]) -> list[str]:
        return [
            port.get_any_name()
            for port in self._compiled.inputs
            if not port.get_names() & (inputs.keys() | self._fixed.keys())
        ]
