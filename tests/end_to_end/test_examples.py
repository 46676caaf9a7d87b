"""The examples run as a user would run them."""

import subprocess
import sys
from pathlib import Path

from optimum_scap.openvino.folder import read_folder_parameters


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
