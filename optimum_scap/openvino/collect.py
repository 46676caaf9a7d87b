"""Runs an `ov.Model` over samples, and hands out what enters its layers, or how much of it they prune."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
from openvino import opset13 as opset

from ..core.backend import Add, Collector, Counter, Visit
from ..core.criterion import Criterion
from ..core.targets import Group
from ..data.padding import Padding
from .fast_passes import speed_up
from .graph import named_layers
from .inference import Runner, model_with_outputs
from .threshold_ops import ThresholdOps, add_bias_correction, find_threshold_ops, insert_adjustable_ops


if TYPE_CHECKING:
    from numpy.typing import NDArray


class OpenVINOCollector(Collector):
    """Runs the model with criteria that can be changed between passes without recompiling.

    In a clone of the model every group becomes `Select(s * |x - m| <= t, m, x)` with m and t as model inputs; what is
    pruned takes the value m itself, so that no bias has to be folded while m is not known. Bias corrections, by module
    path, are constants of the clone.
    """

    def __init__(
        self,
        model: ov.Model,
        groups: Sequence[Group],
        scales: "Mapping[str, NDArray[np.float32]]",
        corrections: "Mapping[str, NDArray[np.float32]]",
    ) -> None:
        self._groups = groups
        clone = model.clone()
        layers = named_layers(clone)
        parameters, outputs = [], []
        # All inputs are looked up before the first of them is changed: groups of one site read the same tensor.
        for group in groups:
            outputs.append(layers[group.key].activations)
        for path, correction in corrections.items():
            add_bias_correction(layers[path], correction)
        for index, group in enumerate(groups):
            mode, threshold = (_scalar_parameter(_input_name(index, name)) for name in ("mode", "threshold"))
            insert_adjustable_ops([layers[path] for path in group.layers], mode, threshold, scales.get(group.key))
            parameters += [mode, threshold]
        self._run = Runner(speed_up(model_with_outputs(clone, outputs, parameters)))

    def set(self, criteria: Mapping[str, Criterion]) -> None:
        inputs = {}
        for index, group in enumerate(self._groups):
            inputs[_input_name(index, "mode")] = np.array(criteria[group.key].mode)
            inputs[_input_name(index, "threshold")] = np.array(criteria[group.key].threshold)
        self._run.set_fixed_inputs(inputs)

    def run(self, sample: Any, visit: Visit) -> None:
        named = self._run.inputs_by_name(sample)
        padding = Padding(named)
        for group, activations in zip(self._groups, self._run(named), strict=True):
            rows = padding.kept_rows(group.key, activations.shape)
            visit(group.key, activations if rows is None else activations.reshape(-1, activations.shape[-1])[rows])


class OpenVINOCounter(Counter):
    """Counts what the threshold operations of a sparse model prune; the model itself is not changed."""

    def __init__(self, model: ov.Model) -> None:
        clone = model.clone()
        self._ops = find_threshold_ops(clone)
        shares = [_pruned_by_token(match) for match in self._ops]
        self._run = Runner(speed_up(model_with_outputs(clone, shares)))

    def run(self, sample: Any, add: Add) -> None:
        inputs = self._run.inputs_by_name(sample)
        padding = Padding(inputs)
        for match, by_token in zip(self._ops, self._run(inputs), strict=True):
            rows = padding.kept_rows(match.layer.path, (*by_token.shape, match.layer.in_features))
            values = by_token.reshape(-1) if rows is None else by_token.reshape(-1)[rows]
            add(match.layer.path, float(values.sum(dtype=np.float64)), values.size)


def _pruned_by_token(match: ThresholdOps) -> ov.Output:
    """The fraction of input channels that is pruned of each token: `[...]` for activations `[..., channels]`."""
    score = match.mask.get_node().input_value(0)
    threshold = opset.constant(np.float32(match.criterion.threshold))
    pruned = opset.convert(opset.less_equal(score, threshold), "f32")
    return opset.reduce_mean(pruned, opset.constant(np.array([-1], dtype=np.int64))).output(0)


def _scalar_parameter(name: str) -> ov.Node:
    parameter = opset.parameter([], np.float32, name=name)
    parameter.output(0).set_names({name})
    return parameter


def _input_name(index: int, what: str) -> str:
    return f"scap.{index}.{what}"
