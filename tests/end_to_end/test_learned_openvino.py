"""Learned calibration of IRs: one command that learns in PyTorch first, and parameters that are calibrated anew."""

import json
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from command_line import optimum_cli, optimum_cli_in_process
from optimum.intel import OVModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import optimum_scap  # noqa: F401  registers the checkpoints
from optimum_scap import SCAPConfig, SCAPError, load_parameters, save_parameters, sparsify_activations
from optimum_scap.data.text import token_windows
from optimum_scap.evaluation.perplexity import perplexity
from optimum_scap.folders import read_folder_parameters
from optimum_scap.openvino.backend import measure_sparsity, read_parameters
from optimum_scap.sparsify import find_parameters


SPEC = "up=0.35,gate=0.35,down=0.55"
QUICK = ("--scap-num-samples", "16", "--scap-seq-len", "64", "--scap-learn-steps", "6", "--scap-learn-samples", "32")
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}


def calibration_inputs(model: OVModelForCausalLM, text: Path, tokenizer: Path) -> list[dict[str, np.ndarray]]:
    windows = token_windows(text, AutoTokenizer.from_pretrained(tokenizer), 32, 64)[:16]
    ids = [torch.tensor([window["input_ids"]]) for window in windows]
    return [model.prepare_inputs(sample, torch.ones_like(sample)) for sample in ids]


def test_one_command_learns_exports_quantizes_and_calibrates_anew(tiny: Path, tmp_path: Path) -> None:
    data = ("--scap-dataset", tiny / "text.txt", "--scap-learn-tokens", "256")
    flags = ("--scap", SPEC, "--scap-preset", "quality", "--scap-total", "0.45", *QUICK, *data)
    task = ("--task", "text-generation-with-past", "--weight-format", "int8")
    result = optimum_cli("export", "openvino", "-m", tiny / "hf", *task, *flags, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "SCAP learning, KL" in result.stderr and "SCAP calibration" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    record = json.loads((tmp_path / "out" / "openvino_config.json").read_text())
    assert record["quantization_config"]["tokenizer"] == str(tiny / "hf")

    (parameters,) = read_folder_parameters(tmp_path / "out").values()
    assert {layer.tensors for layer in parameters.layers.values()} == {("bias_correction",)}
    assert len({layer.target_sparsity for layer in parameters.layers.values()}) == 4
    assert parameters.config.learn == ("thresholds", "biases", "gains")
    assert parameters.config.dataset == str(tiny / "text.txt")

    model = OVModelForCausalLM.from_pretrained(tmp_path / "out", compile=False)
    constants = [op for op in model.model.get_ops() if op.get_type_name() == "Constant"]
    assert any(constant.get_element_type() in (ov.Type.u8, ov.Type.i8) for constant in constants)
    realized = measure_sparsity(model.model, calibration_inputs(model, tiny / "text.txt", tiny / "hf"))
    for path, layer in parameters.layers.items():
        assert realized[path] == pytest.approx(layer.target_sparsity, abs=0.01), path
    assert np.mean([realized[path] for path in parameters.layers]) == pytest.approx(0.45, abs=0.01)


def test_parameters_of_a_float_model_on_integer_weights(tiny: Path, tmp_path: Path) -> None:
    """The file that learning in PyTorch gives; on weights that were quantized, its thresholds alone change."""
    text = tiny / "text.txt"
    config = SCAPConfig.from_spec(
        SPEC,
        dataset=str(text),
        num_samples=16,
        seq_len=64,
        learn=("thresholds", "biases"),
        learn_steps=4,
        learn_samples=32,
        learn_tokens=256,
    )
    float_model = AutoModelForCausalLM.from_pretrained(tiny / "hf")
    before = {name: value.clone() for name, value in float_model.state_dict().items()}
    learned = find_parameters(float_model, config, tokenizer=tiny / "hf")
    assert all(torch.equal(value, before[name]) for name, value in float_model.state_dict().items())
    assert type(float_model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    save_parameters(learned, tmp_path / "learned.json")
    assert load_parameters(tmp_path / "learned.json") == learned

    dense, out = tmp_path / "dense", tmp_path / "out"
    model = OVModelForCausalLM.from_pretrained(tiny / "hf", export=True, compile=False, load_in_8bit=True)
    model.save_pretrained(dense)
    AutoTokenizer.from_pretrained(tiny / "hf").save_pretrained(dense)
    file = ("--scap-parameters", tmp_path / "learned.json", "--scap-recalibrate")
    result = optimum_cli("scap", "apply", dense, out, *file, "--scap-num-samples", "8")
    assert result.returncode == 0, result.stderr
    (applied,) = read_folder_parameters(out).values()
    assert applied.layers.keys() == learned.layers.keys() and applied.config.num_samples == 8
    moved = 0
    for path, layer in learned.layers.items():
        assert applied.layers[path].target_sparsity == layer.target_sparsity
        assert np.array_equal(applied.tensor(path, "bias_correction"), learned.tensor(path, "bias_correction"))
        moved += applied.layers[path].threshold != layer.threshold
    assert moved > len(learned.layers) // 2

    sparse = OVModelForCausalLM.from_pretrained(out, compile=False)
    inputs = calibration_inputs(sparse, text, tiny / "hf")[:8]
    realized = measure_sparsity(sparse.model, inputs)
    for path, layer in learned.layers.items():
        assert realized[path] == pytest.approx(layer.target_sparsity, abs=0.01), path

    # The biases are what the sparse model computes with, in OpenVINO's operations and in ours.
    stock, fast = (
        cls.from_pretrained(out, ov_config=EXACT) for cls in (OVModelForCausalLM, optimum_scap.OVModelForCausalLM)
    )
    ids = torch.arange(100, 140)[None]
    logits = [model(input_ids=ids).logits for model in (stock, fast)]
    assert torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3 * float(logits[0].abs().max()))


def test_recalibration_in_memory(tiny: Path) -> None:
    """On the very weights and text of the calibration, it finds the thresholds again."""
    model = AutoModelForCausalLM.from_pretrained(tiny / "hf")
    samples = [torch.arange(first, first + 64)[None] % 1000 for first in range(0, 640, 40)]
    found = find_parameters(model, SCAPConfig.from_spec(SPEC), samples)
    sparsify_activations(model, found, samples, recalibrate=True)
    from optimum_scap.torch.backend import read_parameters as read_torch

    again = read_torch(model)
    assert again is not None
    for path, layer in found.layers.items():
        assert again.layers[path].threshold == pytest.approx(layer.threshold, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--scap", SPEC, "--scap-recalibrate"), "--scap-recalibrate needs --scap-parameters"),
        (("--scap-preset", "quality"), "--scap-preset needs --scap"),
        (("--scap", SPEC, "--scap-preset", "balanced", "--scap-apply-to", "decode"), "--scap-learn thresholds"),
        (("--scap-parameters", "FILE", "--scap-dataset", "auto"), "--scap-dataset cannot be used with"),
        (("--scap-parameters", "FILE", "--scap-recalibrate", "--scap-seq-len", "0"), "--scap-recalibrate: seq_len"),
        (("--scap-parameters", "FILE", "--scap-recalibrate", "--scap-mode", "kde"), "--scap-mode cannot be used with"),
    ],
)
def test_what_does_not_fit_is_one_line(tiny: Path, tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    (parameters,) = read_folder_parameters(tiny / "sparse").values()
    save_parameters(parameters, tmp_path / "file.json")
    given = [str(tmp_path / "file.json") if flag == "FILE" else flag for flag in flags]
    task = ("--task", "text-generation-with-past")
    result = optimum_cli_in_process("export", "openvino", "-m", tiny / "hf", *task, *given, tmp_path / "out")
    assert result.returncode == 1 and message in result.stderr, result.stderr
    assert len([line for line in result.stderr.splitlines() if "error:" in line]) == 1
    assert not (tmp_path / "out").exists()


def test_vectors_of_another_model_are_refused_before_calibration(tiny: Path) -> None:
    model = OVModelForCausalLM.from_pretrained(tiny / "dense", compile=False)
    (parameters,) = read_folder_parameters(tiny / "sparse").values()
    path = next(iter(parameters.layers))
    wrong = parameters.with_tensor(path, "bias_correction", np.ones(3))
    with pytest.raises(SCAPError, match="bias_correction has 3 values"):
        sparsify_activations(model, wrong, "no such data set", recalibrate=True)
    assert read_parameters(model.model) is None


def test_an_ir_cannot_learn_and_says_what_to_do(tiny: Path) -> None:
    model = OVModelForCausalLM.from_pretrained(tiny / "dense", compile=False)
    with pytest.raises(SCAPError, match="optimum-cli export openvino learns before it exports"):
        sparsify_activations(model, SCAPConfig.from_spec(SPEC, learn=("biases",)), ["w1 w2 w3"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_learning_makes_a_real_model_better(smollm2: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    calibration, evaluation = texts
    data = ("--scap-dataset", calibration, "--scap-num-samples", "16", "--scap-seq-len", "128")
    quick = ("--scap-preset", "balanced", "--scap-learn-steps", "8", "--scap-learn-tokens", "512")
    task = ("--task", "text-generation-with-past", "--weight-format", "int8")
    found = {}
    for name, flags in (("published", ()), ("learned", quick)):
        command = ("export", "openvino", "-m", smollm2, *task, "--scap", SPEC, *data, *flags, tmp_path / name)
        result = optimum_cli(*command)
        assert result.returncode == 0, result.stderr
        model = OVModelForCausalLM.from_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        found[name] = perplexity(model, tokenizer, evaluation.read_text(), max_tokens=2048)
    assert found["learned"] < 0.99 * found["published"], json.dumps(found)
