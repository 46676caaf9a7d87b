"""What the GPU benchmark compares with, on stand-ins for the kernels of CATS: its checkout is the user's."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from optimum_scap.core.parameters import LayerParameters
from optimum_scap.evaluation.report import Report


BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
STAND_INS = """
import torch

def gather_gemv_elemul_flag_3d(x, activated, weight, kept):
    return torch.where(kept, activated * (x @ weight.t()), 0)

def gather_transposed_gemv_flag_3d(x, weight, kept):
    assert weight.is_contiguous() and x.shape[:2] == (1, 1)
    return torch.where(kept, x, 0) @ weight
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    file = tmp_path / "CATS" / "flash_gemv" / "flash_gemv" / "kernels.py"
    file.parent.mkdir(parents=True)
    file.write_text(STAND_INS)
    return tmp_path / "CATS"


@pytest.fixture
def baselines(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_baselines

    return gpu_baselines


@pytest.mark.parametrize("compiled", [False, True])
def test_cats_prunes_the_wanted_neurons_and_one_token_gives_what_several_give(
    baselines: Any, checkout: Path, compiled: bool
) -> None:
    from random_models import random_llama

    device = torch.get_default_device()
    model: Any = random_llama("small", device, torch.float32)
    dense = model.model.layers[1].mlp
    gate, up, down = (getattr(dense, name).weight.detach().clone() for name in ("gate_proj", "up_proj", "down_proj"))
    ids = torch.randint(32000, (2, 64), device=device)
    baselines.install_cats(model, baselines.load_cats(checkout), 0.4, ids)
    assert baselines.pruned_fractions(model, ids).by_role["neurons"] == pytest.approx(0.4, abs=1e-3)

    block = model.model.layers[1].mlp
    x = torch.randn(1, 2, 1024)
    activated = F.silu(x @ gate.t())
    kept = torch.where(activated.abs() > block.threshold, activated, 0)
    expected = (kept * (x @ up.t())) @ down.t()
    run = torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(run(x[:, 1:]), expected[:, 1:], rtol=1e-4, atol=1e-4)


def test_the_references_layer_prunes_its_input(baselines: Any, checkout: Path) -> None:
    dense = torch.nn.Linear(128, 24, bias=False)
    parameters = LayerParameters(role="down", method="zero", target_sparsity=0.5, mode=0.0, threshold=0.7)
    layer = baselines.ReferenceLinear(dense, parameters, baselines.load_cats(checkout).linear)
    x = torch.randn(1, 2, 128)
    with torch.no_grad():
        expected = dense(torch.where(x.abs() > 0.7, x, 0))
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer(x[:, 1:]), expected[:, 1:])


@pytest.mark.slow
def test_the_benchmark_compares_with_both(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    command = [sys.executable, BENCHMARKS / "gpu_decode.py", "--shape", "small", "--eager", "--dtype", "float32"]
    command += ["--cats", checkout, "--reference", "--scap", "up=0.35,gate=0.35,down=0.55", "--repeats", "1"]
    command += ["--prompt-tokens", "16", "--new-tokens", "2", "--json", tmp_path / "out.json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    reference = "reference's method, float32, not compiled"
    report, beside = (Report.model_validate(found[name]) for name in ("report", "reference"))
    spec = "up=0.35,gate=0.35,down=0.55"
    names = ["dense", "dense, attention as in SCAP", f"{spec}, dense layers stock", spec, "CATS, attention as in SCAP"]
    assert list(report.contestants) == names and list(report.quantity("decode").values) == names
    assert list(beside.contestants) == ["dense, float32, not compiled", reference]
    sizes = report.quantity("weights").values
    assert sizes["dense"] == sizes[spec] == sizes[f"{spec}, dense layers stock"]
    assert report.sparsity["CATS, attention as in SCAP"].by_role["neurons"] == pytest.approx(0.377, abs=0.02)
    assert beside.sparsity[reference].by_role["down"] == pytest.approx(0.55, abs=0.02)
    assert found["SCAP over the reference's method"] > 0
    assert found["at equal quality"]["CATS decode vs dense with the same attention"] > 0
