"""Files of parameters: ours, the reference's, and everything that is neither."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimum_scap import SCAPConfig, SCAPError, SCAPParameters, load_parameters, save_parameters
from optimum_scap.parameters import LayerParameters, checkpoint_parameters


ENTRY = {
    "module_name": "model.layers.0.mlp.up_proj",
    "demode_method": "kde",
    "mode": -0.017,
    "threshold": 0.1,
    "target_sparsity": 0.35,
    "hook_type": "pre_hook",
}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_round_trip(tmp_path: Path) -> None:
    layer = LayerParameters(role="down", method="median", target_sparsity=0.5, mode=0.1, threshold=0.2)
    assert layer.mode == float(np.float32(0.1))  # what is compared is float32, so that is what is kept
    config = SCAPConfig.from_spec("0.5", mode="median")
    parameters = SCAPParameters(version="1", config=config, layers={"a.down_proj": layer})
    save_parameters(parameters, tmp_path / "p.json")
    assert load_parameters(tmp_path / "p.json") == parameters
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    with pytest.raises(SCAPError, match="cannot be written to .*missing"):
        save_parameters(parameters, tmp_path / "missing" / "p.json")


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("model.layers.0.mlp.up_proj", "up"),  # Llama, Mistral
        ("model.layers.31.mlp.gate_proj", "gate"),
        ("transformer.blocks.3.ffn.down_proj", "down"),  # MPT
        ("transformer.h.0.mlp.dense_h_to_4h", "up"),  # Falcon
        ("transformer.h.0.mlp.dense_4h_to_h", "down"),
    ],
)
def test_the_references_file_as_it_is(path: str, role: str, tmp_path: Path) -> None:
    found = load_parameters(write(tmp_path / "calibrated_thresholds.json", {path: {**ENTRY, "module_name": path}}))
    layer = found.layers[path]
    assert (layer.role, layer.method, layer.target_sparsity) == (role, "kde", 0.35)
    assert (layer.mode, layer.threshold) == (float(np.float32(-0.017)), float(np.float32(0.1)))
    assert found.config.targets[role].sparsity == 0.35


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "expected a JSON object"),
        ("{}", "expected a JSON object"),
        ({"up_proj": 3}, "layer up_proj: "),
        ({"up_proj": {**ENTRY, "threshold": -1}}, "layer up_proj: threshold: "),
        ({"up_proj": {**ENTRY, "threshold": 1e39}}, "layer up_proj: threshold: .*finite float32"),
        (json.dumps({"up_proj": {**ENTRY, "mode": float("nan")}}), "layer up_proj: mode: .*finite float32"),
        ({"up_proj": {**ENTRY, "hook_type": "post_hook"}}, "layer up_proj: hook_type: "),
        ({"up_proj": {**ENTRY, "demode_method": "max"}}, "layer up_proj: demode_method: "),
        ({"up_proj": {key: ENTRY[key] for key in ENTRY if key != "mode"}}, "layer up_proj: mode: "),
        ({"architectures": ["Llama"], "vocab_size": 8}, "neither what scap info --json writes nor"),
        ({"something": ENTRY}, "layer something: no role is known"),
        ({"layers": {}}, "version: "),
        ({"version": "1", "config": {"targets": {"up": 0.5}}, "layers": {}}, "layers: "),
    ],
)
def test_damaged_files(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SCAPError, match=message):
        load_parameters(write(tmp_path / "p.json", content))


def test_a_damaged_file_is_not_recited(tmp_path: Path) -> None:
    layers = {f"model.layers.{i}.mlp.up_proj": {"role": "up"} for i in range(100)}
    with pytest.raises(SCAPError, match=r"version: Field required; .* and \d+ more$") as caught:
        load_parameters(write(tmp_path / "p.json", {"layers": layers}))
    assert len(str(caught.value)) < 500


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"up_proj": ENTRY}).encode())
    assert load_parameters(tmp_path / "p.json").layers.keys() == {"up_proj"}


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SCAPError, match="cannot be read"):
        load_parameters(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(bytes(range(256)))
    with pytest.raises(SCAPError, match="cannot be read"):
        load_parameters(tmp_path / "binary.json")


def test_parameters_of_checkpoints(tmp_path: Path) -> None:
    write(tmp_path / "config.json", {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}})
    assert checkpoint_parameters(tmp_path) is None
    write(tmp_path / "config.json", {"quantization_config": {"quant_method": "scap", "layers": {}}})
    with pytest.raises(SCAPError, match=r"config\.json: damaged SCAP parameters"):
        checkpoint_parameters(tmp_path)
