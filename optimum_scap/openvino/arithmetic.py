"""How the C++ operations compute: what OpenVINO's properties say, which are the user's way of saying it."""

from functools import lru_cache
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as opset
from optimum.intel.openvino import modeling_base


_GROUP_SIZE = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
# What says how OpenVINO is to compute, in the config of a model.
_KEYS = ("INFERENCE_PRECISION_HINT", "EXECUTION_MODE_HINT", _GROUP_SIZE, "DEVICE_PROPERTIES")
# Of activations, and what the operations take.
_SMALLEST_GROUP, _LARGEST_GROUP = 16, 256
# Wider than OpenVINO's own, 32, since sums are scaled less often. What it costs in perplexity is measured by
# examples/benchmarks/activation_groups.py.
DEFAULT_GROUP_SIZE = 128


def preferred_precision(ov_config: dict[str, Any] | None = None) -> str:
    """The precision of the operations for a model's `ov_config`.

    f32 where OpenVINO is told to compute in it: by `INFERENCE_PRECISION_HINT`, by `EXECUTION_MODE_HINT`, or by
    properties of optimum-intel's core. Else what OpenVINO would do with many rows on this CPU: bf16 where it is
    native.

    Raises:
        RuntimeError: OpenVINO does not know one of the values.
    """
    asked = _asked(ov_config)
    hinted = _inference_precision(asked)
    is_named = "INFERENCE_PRECISION_HINT" in str(asked)
    # CPUs without native bf16 answer f32 where nobody asked; dynamic is what the accuracy mode answers.
    if hinted == ov.Type.dynamic or (hinted == ov.Type.f32 and (is_named or _prefers_bf16())):
        return "f32"
    return "bf16" if hinted == ov.Type.bf16 and _prefers_bf16() else "split"


def preferred_group_size(ov_config: dict[str, Any] | None = None) -> int:
    """How many channels of an activation's row share a scale, many rows having one byte each; 0 is two bytes.

    `DYNAMIC_QUANTIZATION_GROUP_SIZE` where `ov_config` names it, from 16 to 256; 0 also in OpenVINO's accuracy mode;
    else DEFAULT_GROUP_SIZE.

    Raises:
        RuntimeError: OpenVINO does not know one of the values.
    """
    size = asked_group_size(ov_config)
    return DEFAULT_GROUP_SIZE if size is None else size


def asked_group_size(ov_config: dict[str, Any] | None) -> int | None:
    """`preferred_group_size` where `ov_config` or optimum-intel's core asks for one; None where nobody does."""
    asked = _asked(ov_config)
    size = int(_probe(asked).get_property(_GROUP_SIZE))
    if size == 0:
        return 0
    is_named = _GROUP_SIZE in str(asked) or size != _openvino_default()
    return min(max(size, _SMALLEST_GROUP), _LARGEST_GROUP) if is_named else None


def _asked(ov_config: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (ov_config or {}).items() if key in _KEYS}


def _inference_precision(config: dict[str, Any]) -> ov.Type:
    return _probe(config).get_property("INFERENCE_PRECISION_HINT")


def _probe(config: dict[str, Any], core: ov.Core | None = None) -> ov.CompiledModel:
    """A model of one operation, which tells what OpenVINO makes of `config`: it knows many spellings.

    `core` is optimum-intel's by default.
    """
    x = opset.parameter([1], np.float32)
    model = ov.Model([opset.relu(x)], [x], "precision")
    return (core or modeling_base.core).compile_model(model, "CPU", config | {"CACHE_DIR": ""})


@lru_cache
def _openvino_default() -> int:
    """A core that nobody has told anything."""
    return int(_probe({}, ov.Core()).get_property(_GROUP_SIZE))


@lru_cache
def _prefers_bf16() -> bool:
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
