"""Bad input: one line, exit code 1 or 2, no traceback, nothing written."""

import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from command_line import optimum_cli, optimum_cli_in_process
from openvino import opset13 as opset


def assert_refused(result: subprocess.CompletedProcess[str], message: str, output: Path) -> None:
    assert result.returncode in (1, 2), result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1, result.stderr
    assert message in errors[0]
    assert not output.exists()
    assert not list(output.parent.glob(f".{output.name}.scap-*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scap", "side=0.5"], "unknown role 'side'"),
        (["--scap", "up=1.0"], "less than 1"),
        (["--scap", "up=-0.5"], "greater than or equal to 0"),
        (["--scap", "up,zero"], "not a multiple of three"),
        (["--scap", "0.5", "--scap-mode", "max"], "unknown mode 'max'"),
        (["--scap", "0.5", "--scap-exclude", "("], "not a regular expression"),
        (["--scap", "0.5", "--scap-num-samples", "0"], "num_samples"),
        (["--scap", "0.5", "--scap-dataset", "no-such-set"], "neither a file nor a name"),
        (["--scap", "0.5", "--scap-dataset", "missing.txt"], "missing.txt does not exist"),
        (["--scap-num-samples", "4"], "--scap-num-samples needs --scap"),
    ],
)
def test_flags(flags: list[str], message: str, tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert_refused(optimum_cli_in_process("export", "openvino", "-m", tiny / "hf", *flags, output), message, output)


def test_a_missing_model_folder(tmp_path: Path) -> None:
    output = tmp_path / "out"
    missing = tmp_path / "missing"
    assert_refused(
        optimum_cli_in_process("export", "openvino", "-m", missing, "--scap", "0.5", output), "missing", output
    )
    assert_refused(optimum_cli_in_process("scap", "apply", missing, output, "--scap", "0.5"), "does not exist", output)
    assert_refused(optimum_cli_in_process("scap", "info", missing), "does not exist", output)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n ", "is empty"),
        ("short.txt", b"A few words only.", "too short"),
        ("binary.txt", b"\xff\xfe\x00\x80abc", "cannot be read"),
        ("broken.jsonl", b'{"text": "unfinished', "cannot be read"),
        ("columns.jsonl", b'{"a": "x", "b": "y"}', "column of strings called 'text'"),
        ("broken.parquet", b"not parquet", "cannot be read"),
        ("empty.jsonl", b"", "is empty"),
    ],
)
def test_datasets(name: str, content: bytes, message: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    output = tmp_path / "out"
    result = optimum_cli_in_process(
        "scap", "apply", tiny / "dense", output, "--scap", "0.5", "--scap-dataset", tmp_path / name
    )
    assert_refused(result, message, output)
    assert name in result.stderr


def test_a_hub_dataset_without_network_suggests_the_alternatives(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = optimum_cli_in_process(
        "scap", "apply", tiny / "dense", output, "--scap", "0.5", "--scap-dataset", "wikitext2"
    )
    assert_refused(result, "without network use a local .txt, .jsonl, .json or .parquet file, or auto", output)


def test_a_pattern_that_matches_no_layer(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = optimum_cli_in_process(
        *("scap", "apply", tiny / "dense", output, "--scap", "0.5", "--scap-dataset", tiny / "text.txt"),
        *("--scap-exclude", "expert"),
    )
    assert_refused(result, "'expert' matches no fully connected layer", output)


def test_a_folder_that_is_sparse_already(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = optimum_cli_in_process(
        "scap", "apply", tiny / "sparse", output, "--scap", "0.5", "--scap-dataset", tiny / "text.txt"
    )
    assert_refused(result, "already holds SCAP", output)


def test_folders_without_a_usable_model(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def refused(folder: Path, message: str) -> None:
        result = optimum_cli_in_process(
            "scap", "apply", folder, output, "--scap", "0.5", "--scap-dataset", tiny / "text.txt"
        )
        assert_refused(result, message, output)

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "holds no OpenVINO model")

    without_layers = tmp_path / "without-layers"
    without_layers.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (without_layers / name).write_bytes((tiny / "dense" / name).read_bytes())
    ids = opset.parameter([-1, -1], np.int64, name="input_ids")
    ids.output(0).set_names({"input_ids"})
    logits = opset.unsqueeze(opset.convert(ids, "f32"), opset.constant([2]))
    logits.output(0).set_names({"logits"})
    ov.save_model(ov.Model([opset.result(logits)], [ids], "m"), without_layers / "openvino_model.xml")
    refused(without_layers, "no fully connected layer")

    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((tiny / "dense" / "config.json").read_bytes())
    (damaged / "openvino_model.xml").write_text("<net>")
    (damaged / "openvino_model.bin").write_bytes(b"")
    refused(damaged, "cannot be read")
    result = optimum_cli_in_process("scap", "info", damaged)
    assert_refused(result, "cannot be read", output)


def test_outputs_that_cannot_be_replaced(tiny: Path, tmp_path: Path) -> None:
    holds_files = tmp_path / "thesis"
    holds_files.mkdir()
    (holds_files / "chapter.txt").write_text("mine")
    result = optimum_cli("scap", "apply", tiny / "dense", holds_files, "--scap", "0.5")
    assert result.returncode == 1 and "is not replaced: it holds chapter.txt" in result.stderr
    assert [path.name for path in holds_files.iterdir()] == ["chapter.txt"]
    result = optimum_cli("scap", "apply", tiny / "dense", tiny / "dense", "--scap", "0.5")
    assert result.returncode == 1 and "model folder itself" in result.stderr


def test_no_space_left(tiny: Path, tmp_path: Path) -> None:
    """A limit on the size of written files stands in for a full disk: writes fail in the middle of the weights."""
    output = tmp_path / "out"
    limit = 100 * 2**10

    def small_files_only() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    script = Path(sys.executable).with_name("optimum-cli")
    flags = [
        "--scap",
        "0.5",
        "--scap-dataset",
        str(tiny / "text.txt"),
        "--scap-num-samples",
        "2",
        "--scap-seq-len",
        "32",
    ]
    result = subprocess.run(
        [str(script), "scap", "apply", str(tiny / "dense"), str(output), *flags],
        capture_output=True,
        text=True,
        preexec_fn=small_files_only,
        timeout=300,
    )
    assert_refused(result, "", output)


def test_a_full_disk_is_noticed_when_the_ir_is_written(tiny: Path, tmp_path: Path) -> None:
    script = f"""
import resource, signal, sys
from pathlib import Path
import openvino as ov
from optimum_scap import SCAPError
from optimum_scap.openvino.files import save_model
model = ov.Core().read_model({str(tiny / "dense" / "openvino_model.xml")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({100 * 2**10}, {100 * 2**10}))
try:
    save_model(model, Path({str(tmp_path / "model.xml")!r}))
except SCAPError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "could not be written" in result.stdout, result.stderr
