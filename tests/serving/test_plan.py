"""What of a checkpoint vLLM is told, and what it is refused for; without vLLM."""

import subprocess
import sys
from typing import Any

import pytest

from optimum_scap.errors import SCAPError
from optimum_scap.vllm.plan import check_all_found, layers_within, served_parameters


PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION = "model.layers.0.self_attn"


def fields(paths: list[str], **more: Any) -> dict[str, Any]:
    layer = {"estimator": "zero", "target_sparsity": 0.5, "mode": 0.0, "threshold": 0.25}
    return {
        "quant_method": "scap",
        "version": "0.1.0",
        "config": {"targets": {"up": 0.5}},
        "layers": {path: dict(layer) for path in paths},
        **more,
    }


def test_layers_that_vllm_joins_are_found_part_by_part() -> None:
    parameters = served_parameters(fields([f"{ATTENTION}.k_proj", f"{ATTENTION}.o_proj", "h.0.fc"]))
    joined = layers_within(parameters, f"{ATTENTION}.qkv_proj", PACKED)
    assert joined is not None
    assert [None if found is None else found.threshold for found in joined] == [None, 0.25, None]
    alone = layers_within(parameters, f"{ATTENTION}.o_proj", PACKED)
    assert alone == [parameters.layers[f"{ATTENTION}.o_proj"]]
    assert layers_within(parameters, "model.layers.0.mlp.gate_up_proj", PACKED) is None
    assert layers_within(parameters, "h.0.fc", {}) == [parameters.layers["h.0.fc"]]


@pytest.mark.parametrize(
    ("damaged", "words"),
    [
        (fields(["a.b"], layers={}), ["layers"]),
        (fields(["a.b"], layers={"a.b": {"threshold": -1.0}}), ["a.b"]),
        (fields(["a.b"], apply_to="sometimes"), ["apply_to"]),
        (fields(["model.layers.3.mlp.experts.gate", "a.b"]), ["experts", "model.layers.3.mlp.experts.gate"]),
        (fields(["model.layers.3.mlp.experts.7.up"]), ["experts", "model.layers.3.mlp.experts.7.up"]),
        (fields(["a.b"], quantization_config={"quant_method": "fp8"}), ["quantized (fp8)", "with transformers"]),
        (fields(["a.b"], quantization_config={"quant_method": "awq", "bits": 3}), ["AWQ", "3 bits"]),
        ({"quant_method": "scap", "quantization_config": {"quant_method": "gptq"}}, ["integer weights"]),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(damaged: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SCAPError) as error:
        served_parameters(damaged)
    message = str(error.value)
    assert "\n" not in message and message.startswith("quantization_config in config.json")
    for word in words:
        assert word in message


def test_a_pruned_head_is_refused_by_name() -> None:
    head = fields(["lm_head"])
    head["layers"]["lm_head"]["role"] = "head"
    with pytest.raises(SCAPError, match="the head cannot be pruned: lm_head"):
        served_parameters(head)


def test_a_layer_that_vllm_does_not_have_is_named() -> None:
    parameters = served_parameters(fields(["a.b", "a.c"]))
    check_all_found(parameters, {"a.b", "a.c", "a.d"})
    with pytest.raises(SCAPError, match=r"no layer a\.c to prune \(1 such layers"):
        check_all_found(parameters, {"a.b"})


def test_integer_weights_that_are_read_may_lie_below() -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert served_parameters(fields(["a.b"], quantization_config=config)).quantization_config == config


def test_neither_the_plan_nor_the_operation_imports_vllm() -> None:
    script = (
        "import sys, optimum_scap.vllm, optimum_scap.vllm.plan, optimum_scap.vllm.integer_operation\n"
        "print([name for name in sys.modules if name == 'vllm' or name.startswith('vllm.')])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
