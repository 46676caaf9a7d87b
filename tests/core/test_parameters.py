"""Files of parameters: ours, the reference's, and everything that is neither."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimum_scap import SCAPConfig, SCAPError, SCAPParameters, load_parameters, save_parameters
from optimum_scap.core.parameter_files import checkpoint_parameters
from optimum_scap.core.parameters import LayerParameters


ENTRY = {
    "module_name": "model.layers.0.mlp.up_proj",
    "demode_method": "kde",
    "mode": -0.017,
    "threshold": 0.1,
    "target_sparsity": 0.35,
    "hook_type": "pre_hook",
}


LAYER = {"role": "up", "method": "zero", "target_sparsity": 0.5, "mode": 0, "threshold": 1}
OURS = {"version": "1", "config": {"targets": {"up": 0.5}}, "layers": {"a.up_proj": LAYER}}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_round_trip(tmp_path: Path) -> None:
    layer = LayerParameters(role="down", estimator="median", target_sparsity=0.5, mode=0.1, threshold=0.2)
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
    assert (layer.role, layer.estimator, layer.target_sparsity) == (role, "kde", 0.35)
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
        ({"up_proj": {**ENTRY, "threshold": True}}, "layer up_proj: threshold: .*a number .got True"),
        ({"up_proj": {**ENTRY, "mode": "0.5"}}, "layer up_proj: mode: .*a number .got '0.5'"),
        ({"up_proj": {**ENTRY, "target_sparsity": False}}, "layer up_proj: target_sparsity: .*a number"),
        ({"up_proj": {**ENTRY, "threshold": [1]}}, "layer up_proj: threshold: "),
        (json.dumps({"up_proj": {**ENTRY, "threshold": float("inf")}}), "layer up_proj: threshold: .*finite float32"),
        (json.dumps({"up_proj": {**ENTRY, "target_sparsity": float("nan")}}), "layer up_proj: target_sparsity: "),
        ({"up_proj": {**ENTRY, "threshold": 10**400}}, "layer up_proj: threshold: "),
        ('{"up_proj": {"threshold": ' + "9" * 5000 + "}}", "cannot be read"),
        (json.dumps({"up_proj": ENTRY})[:-1] + ', "up_proj": {}}', r"p\.json: up_proj is given twice"),
        ('{"up_proj": {"threshold": 1, "threshold": 2}}', r"p\.json: up_proj\.threshold is given twice"),
        ({"up_proj\n": ENTRY}, r"layer up_proj\\n: no role is known"),
        ({**OURS, "version": "x" * 1000}, "version: .*at most 100 characters"),
        ({**OURS, "version": 1}, "version: "),
        ({**OURS, "config": {"targets": {"up": "0.5"}}}, "config.targets.up.sparsity: .*a number .got '0.5'"),
        ({**OURS, "config": {"targets": {"up": 0.5}, "exclude": ["("]}}, "config.exclude: .*not a regular expression"),
        ({**OURS, "layers": {"a": {**LAYER, "threshold": True}}}, "layers.a.threshold: .*a number .got True"),
        ({**OURS, "layers": {"a": {**LAYER, "mode": "1"}}}, "layers.a.mode: .*a number .got '1'"),
        ({**OURS, "layers": {"a\n": {**LAYER, "mode": "1"}}}, r"layers.a\\n.mode: "),
        ({**OURS, "layers": [LAYER]}, "layers: "),
        ({**OURS, "layers": {"a": json.loads("[" * 200 + "]" * 200)}}, "layers.a: "),
    ],
)
def test_damaged_files(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SCAPError, match=message) as caught:
        load_parameters(write(tmp_path / "p.json", content))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_whole_numbers_are_numbers(tmp_path: Path) -> None:
    found = load_parameters(write(tmp_path / "p.json", OURS)).layers["a.up_proj"]
    assert (found.mode, found.threshold) == (0.0, 1.0)


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


def test_a_file_of_any_size_is_no_parameters_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimum_scap.core.parameter_files._LARGEST_FILE", 1000)
    with pytest.raises(SCAPError, match="cannot be read: it is larger than"):
        load_parameters(write(tmp_path / "p.json", {**OURS, "version": "x" * 2000}))


def test_what_a_config_json_repeats_elsewhere_does_not_matter(tmp_path: Path) -> None:
    ours = json.dumps({**OURS, "quant_method": "scap"})
    write(tmp_path / "config.json", f'{{"vocab_size": 1, "vocab_size": 2, "quantization_config": {ours}}}')
    assert checkpoint_parameters(tmp_path).layers.keys() == {"a.up_proj"}
    twice = ours[:-1] + ', "layers": {}}'
    write(tmp_path / "config.json", f'{{"quantization_config": {twice}}}')
    with pytest.raises(SCAPError, match=r"config\.json: layers is given twice"):
        checkpoint_parameters(tmp_path)


# What version 0.1.0 wrote, and a file of the reference implementation.
@pytest.mark.parametrize(
    "content",
    [
        '{"version":"0.1.0","config":{"targets":{"up":{"sparsity":0.5,"mode":"zero"}},"include":[],"exclude":["a"],'
        '"dataset":"auto","num_samples":64,"seq_len":256,"seed":42,"apply_to":"all"},"layers":{"m.up_proj":'
        '{"role":"up","method":"zero","target_sparsity":0.5,"mode":0.0,"threshold":0.10000000149011612}}}',
        '{"m.up_proj": {"module_name": "m.up_proj", "demode_method": "zero", "mode": 0, "threshold": 0.1, '
        '"target_sparsity": 0.5, "hook_type": "pre_hook", "something": "else"}}',
    ],
)
def test_files_that_were_written_before(content: str, tmp_path: Path) -> None:
    found = load_parameters(write(tmp_path / "p.json", content)).layers["m.up_proj"]
    assert found == LayerParameters(role="up", estimator="zero", target_sparsity=0.5, mode=0.0, threshold=0.1)


NAMES = st.sampled_from([*ENTRY, *LAYER, *OURS, "a.up_proj", "targets", "up", "sparsity"]) | st.text(max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["zero", "up"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
ALMOST = st.builds(lambda changes: {**OURS, **changes}, st.dictionaries(st.sampled_from([*OURS]), JSON, max_size=2))
ALMOST_REFERENCE = st.builds(
    lambda changes: {"up_proj": {**ENTRY, **changes}}, st.dictionaries(NAMES, JSON, max_size=2)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(content=JSON.map(json.dumps) | ALMOST.map(json.dumps) | ALMOST_REFERENCE.map(json.dumps) | st.text(max_size=30))
def test_no_content_crashes_the_reader(content: str, tmp_path: Path) -> None:
    check_reader(content.encode("utf-8", "surrogatepass"), tmp_path)


def check_reader(content: bytes, folder: Path) -> None:
    (folder / "p.json").write_bytes(content)
    try:
        found = load_parameters(folder / "p.json")
    except SCAPError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return
    save_parameters(found, folder / "again.json")
    assert load_parameters(folder / "again.json") == found


@given(
    layers=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
        st.builds(
            LayerParameters,
            role=st.sampled_from(["up", "down", "qkv"]),
            estimator=st.sampled_from(["zero", "mean", "median", "kde"]),
            target_sparsity=st.floats(0, 1, exclude_max=True),
            mode=st.floats(width=32, allow_nan=False, allow_infinity=False),
            threshold=st.floats(0, width=32, allow_infinity=False),
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_everything_valid_round_trips(layers: dict[str, LayerParameters], tmp_path: Path) -> None:
    parameters = SCAPParameters(version="1", config=SCAPConfig.from_spec("0.5"), layers=layers)
    save_parameters(parameters, tmp_path / "p.json")
    assert load_parameters(tmp_path / "p.json") == parameters


def damaged(content: bytes, seed: int) -> bytes:
    """`content` with a few bytes or pieces changed, left out, or repeated."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 3)):
        start, length = rng.randrange(len(content)), rng.choice([1, 1, 1, 5, 40])
        piece = content[start : start + length]
        changed = rng.choice(
            [b"", piece * 2, bytes(rng.randrange(256) for _ in piece), b"true", b"NaN", b"1e999", b'"', b"{", b"null"]
        )
        content = content[:start] + changed + content[start + length :]
    return content


WHOLE_FILES = [json.dumps(OURS, indent=2).encode(), json.dumps({"m.up_proj": ENTRY}).encode()]


@pytest.mark.parametrize(
    "seed", [*range(10), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(10, 110))]
)
def test_damaged_bytes(seed: int, tmp_path: Path) -> None:
    for content in WHOLE_FILES:
        check_reader(damaged(content, seed), tmp_path)
