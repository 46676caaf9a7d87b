"""The examples run as a user would run them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from optimum_scap.openvino.files import read_folder_parameters


EXAMPLES = Path(__file__).parents[2] / "examples"


def test_quantize_and_sparsify(smollm2: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = subprocess.run(
        [
            *(sys.executable, EXAMPLES / "quantize_and_sparsify.py", smollm2, output),
            *("--bits", "4", "--group-size", "64", "--dataset", texts[0], "--num-samples", "2"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert "The capital of France is" in result.stdout
    parameters = read_folder_parameters(output)["openvino_model.xml"]
    assert len(parameters.layers) == 90
    assert parameters.config.dataset == str(texts[0])


def test_quantize_and_sparsify_in_pytorch(smollm2: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    from optimum_scap.torch.checkpoint import read_folder_parameters as read_checkpoint

    output = tmp_path / "out"
    command = [sys.executable, EXAMPLES / "quantize_and_sparsify.py", smollm2, output, "--framework", "torch"]
    command += ["--bits", "4", "--group-size", "64", "--dataset", texts[0], "--num-samples", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "The capital of France is" in result.stdout
    parameters = read_checkpoint(output)
    assert len(parameters.layers) == 90 and parameters.quantization_config is not None
    # An embedding of 28 million floats, and 106 million weights of 4.5 bits and a little.
    assert (output / "model.safetensors").stat().st_size < 4 * 28.4e6 + 106.2e6 * 4.9 / 8


@pytest.mark.slow
def test_both_backends_agree(smollm2: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    """Thresholds within 1 %; perplexity as far as so short a text can tell."""
    command = [
        sys.executable,
        EXAMPLES / "benchmarks" / "backends.py",
        smollm2,
        *texts,
        "--json",
        tmp_path / "out.json",
    ]
    command += ["--num-samples", "16", "--seq-len", "128", "--max-tokens", "2048"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["thresholds"]["layers"] == 90 and found["thresholds"]["largest"] < 0.01
    assert found["logits"]["first token of a window, largest"] < 1e-3
    assert found["logits"]["with the IR's masks, largest"] < 1e-2
    values = list(found["perplexity"].values())
    assert max(values) / min(values) < 1.03


def test_generate(smollm2: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from optimum_scap import load_parameters, sparsify_activations

    entry = {"module_name": "", "demode_method": "zero", "mode": 0.0, "threshold": 0.05, "target_sparsity": 0.3}
    (tmp_path / "thresholds.json").write_text(json.dumps({"model.layers.0.mlp.up_proj": entry}))
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    sparsify_activations(model, load_parameters(tmp_path / "thresholds.json")).save_pretrained(tmp_path / "sparse")
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(tmp_path / "sparse")
    command = [sys.executable, EXAMPLES / "generate_gpu.py", tmp_path / "sparse", "The capital of France is"]
    result = subprocess.run([*command, "--new-tokens", "8"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("The capital of France is Paris") == 2
    assert "SCAP / dense: " in result.stdout


def test_calibration_in_pytorch_against_the_references_way(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "benchmarks" / "torch_calibration.py", "--shape", "tiny", "--device", "cpu"]
    command += ["--dtype", "float32", "--num-samples", "16", "--seq-len", "64", "--json", tmp_path / "out.json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["sparsity of our thresholds on the reference's activations, largest miss"] < 0.002
