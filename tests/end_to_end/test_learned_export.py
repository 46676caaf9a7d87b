"""Learned calibration by one command, and its checkpoint in fresh processes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import optimum_cli, optimum_cli_in_process
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import optimum_scap  # noqa: F401  registers the checkpoints
from optimum_scap.data.text import token_windows
from optimum_scap.evaluation.perplexity import perplexity
from optimum_scap.evaluation.sparsity import realized_by_torch
from optimum_scap.torch.backend import pruned_layers, read_parameters


SPEC = ("--scap", "up=0.35,gate=0.35,down=0.55", "--device", "cpu", "--dtype", "float32")
QUICK = ("--scap-num-samples", "16", "--scap-seq-len", "64", "--scap-learn-steps", "6")

LOGITS = """
import sys
import optimum_scap, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    save_file({"logits": model(torch.arange(100, 140)[None]).logits}, sys.argv[2])
"""

# What a machine with a GPU may have: nothing of what is blocked here.
BARE = """
import runpy, sys
for name in ("optimum", "openvino", "nncf", "datasets", "pyarrow", "accelerate", "lm_eval", "peft"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
BENCHMARK = Path(__file__).parents[2] / "examples" / "benchmarks" / "learned_quality.py"


def run(script: str, *arguments: str | Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_checkpoint_with_all_parts_learned(tiny: Path, tmp_path: Path) -> None:
    flags = ("--scap-preset", "quality", "--scap-total", "0.45", "--scap-learn-samples", "32", *QUICK)
    data = ("--scap-dataset", tiny / "text.txt", "--scap-learn-tokens", "256")
    result = optimum_cli("export", "torch", "-m", tiny / "hf", *SPEC, *flags, *data, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert "SCAP learning, KL" in result.stderr

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    parameters = read_parameters(model)
    assert parameters is not None
    asked = parameters.config
    assert (asked.learn, asked.learn_steps, asked.total) == (("thresholds", "biases", "gains"), 6, 0.45)
    assert {layer.tensors for layer in parameters.layers.values()} == {("bias_correction",)}
    assert len({layer.target_sparsity for layer in parameters.layers.values()}) == 4
    windows = token_windows(tiny / "text.txt", AutoTokenizer.from_pretrained(tmp_path / "out"), 32, 64)[:16]
    samples = [{"input_ids": torch.tensor([window["input_ids"]])} for window in windows]
    assert realized_by_torch(model, samples).overall == pytest.approx(0.45, abs=0.01)

    before, after = (load_file(folder / "model.safetensors") for folder in (tiny / "hf", tmp_path / "out"))
    changed = {name.removesuffix(".weight") for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == set(pruned_layers(model))

    run(LOGITS, tmp_path / "out", tmp_path / "logits.safetensors")
    with torch.no_grad():
        here = model(torch.arange(100, 140)[None]).logits
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], here)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--scap-learn", "weights"), "learn"),
        (("--scap-learn-steps", "5"), "--scap-learn-steps needs --scap-learn or --scap-preset"),
        (("--scap-total", "1.5"), "total"),
        (("--scap-preset", "quality", "--scap-apply-to", "decode"), "gains are folded into the weights"),
        (("--scap-preset", "quality", "--weight-format", "int8"), "without --weight-format"),
    ],
)
def test_what_does_not_fit_is_one_line(tiny: Path, tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    data = ("--scap-dataset", tiny / "text.txt", "--scap-num-samples", "4", "--scap-seq-len", "32")
    result = optimum_cli_in_process("export", "torch", "-m", tiny / "hf", *SPEC, *flags, *data, tmp_path / "out")
    assert result.returncode == 1 and message in result.stderr
    assert len([line for line in result.stderr.splitlines() if "error:" in line]) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_benchmark_needs_neither_optimum_nor_openvino_nor_datasets(tiny: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = {"learn": 4096, "boolq": 1024, "hellaswag": 1024, "python": 1024}
    tokens = {name: rng.integers(3, 1000, count, dtype=np.int32) for name, count in texts.items()}
    save_file(tokens, tmp_path / "tokens.safetensors")
    short = ("--steps", "2", "--tokens-per-step", "512", "--num-samples", "2", "--seeds", "0", "1")
    what = ("--settings", "FFN 42 %", "--methods", "published", "thresholds, biases, gains")
    output = tmp_path / "out.json"
    run(BARE, BENCHMARK, "measure", tiny / "hf", tmp_path / "tokens.safetensors", *what, *short, "--json", output)
    rows = json.loads(output.read_text())["rows"]
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("published", 0),
        ("thresholds, biases, gains", 0),
        ("thresholds, biases, gains", 1),
    ]
    for row in rows:
        assert row["sparsity"] == pytest.approx((2 * 0.35 + 0.55) / 3, abs=0.01)
        assert all(abs(row[name]) < 0.5 for name in ("boolq", "hellaswag", "python"))


@pytest.mark.slow
def test_smollm2_loses_less_on_prose_it_has_not_seen(smollm2: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    data = ("--scap-dataset", texts[0], "--scap-num-samples", "8", "--scap-seq-len", "512")
    learned = ("--scap-preset", "balanced", "--scap-learn-steps", "40", "--scap-learn-samples", "64")
    losses = {}
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = texts[1].read_text(encoding="utf-8")
    dense = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    reference = perplexity(dense, tokenizer, text, max_tokens=6144)
    for name, flags in (("published", ()), ("balanced", learned)):
        result = optimum_cli("export", "torch", "-m", smollm2, *SPEC, *flags, *data, tmp_path / name)
        assert result.returncode == 0, result.stderr
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        losses[name] = perplexity(model, tokenizer, text, max_tokens=6144) / reference - 1
    assert losses["published"] == pytest.approx(0.146, abs=0.02)
    assert losses["balanced"] < 0.1
