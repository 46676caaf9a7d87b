"""Inputs of which two implementations of SCAP must prune the same channels, however they round."""

from collections.abc import Mapping

import numpy as np
import openvino as ov

from optimum_scap.openvino.inference import EXACT, model_with_outputs
from optimum_scap.openvino.threshold_ops import find_threshold_ops


def is_settled(model: ov.Model, inputs: Mapping[str, np.ndarray], rounding: float) -> np.ndarray:
    """Whether no activation of a token lies within rounding of its threshold: boolean `[batch, tokens]`.

    Args:
        model: a portable sparse model whose activations are all `[batch, tokens, channels]`.
        inputs: by name.
        rounding: the error of activations, relative to the root mean square of a token's.
    """
    ops = find_threshold_ops(clone := model.clone())
    magnitudes = [match.mask.get_node().input_value(0) for match in ops]
    compiled = ov.Core().compile_model(model_with_outputs(clone, magnitudes), "CPU", EXACT)
    names = {name for port in compiled.inputs for name in port.get_names()}
    found = compiled({name: value for name, value in inputs.items() if name in names})
    settled = np.array(True)
    for index, match in enumerate(ops):
        size = np.sqrt(np.mean(np.square(found[index]), axis=-1, keepdims=True)) + abs(match.criterion.mode)
        # A channel of next to nothing makes no difference, pruned or not: many are 0 behind a ReLU, and so is t then.
        near = np.abs(found[index] - np.float32(match.criterion.threshold)) < rounding * size
        near &= found[index] > rounding * size
        settled = settled & ~near.any(axis=-1)
    return settled
