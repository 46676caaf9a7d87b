"""Fused folders: loaded from anywhere, at the precision that is asked for, and read by the commands."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.properties.hint as hints
import pytest
import torch
from command_line import optimum_cli_in_process
from optimum.intel.openvino import modeling_base
from small_model import write_sparse_llama

from optimum_scap import OVModelForCausalLM, SCAPError
from optimum_scap.folders import fuse_folder
from optimum_scap.openvino import arithmetic, modeling
from optimum_scap.openvino.arithmetic import preferred_precision
from optimum_scap.openvino.extension.build import ExtensionBuildError
from optimum_scap.openvino.files import check_is_portable, model_files, read_folder_parameters
from optimum_scap.openvino.fuse import is_operation
from optimum_scap.openvino.fused_ir import is_fused, read_fused_ir, readable
from optimum_scap.openvino.inference import EXACT
from optimum_scap.openvino.modeling import fused_clone


IDS = torch.tensor([[11, 54, 23, 90, 77, 30]])
IR = "openvino_model.xml"


@pytest.fixture(scope="module")
def small_sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_llama(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def small_fused(small_sparse: Path) -> Path:
    """In bf16, whatever this CPU has."""
    fuse_folder(small_sparse, small_sparse.parent / "fused", precision="bf16")
    return small_sparse.parent / "fused"


@pytest.fixture
def fresh_core(monkeypatch: pytest.MonkeyPatch) -> Iterator[ov.Core]:
    """A core for optimum-intel as a new process has it: it does not know the operations."""
    monkeypatch.setattr(modeling_base, "core", ov.Core())
    modeling.extend_core.cache_clear()
    yield modeling_base.core
    modeling.extend_core.cache_clear()


def logits(folder: Path, config: dict[str, Any], **options: Any) -> np.ndarray:
    model = OVModelForCausalLM.from_pretrained(folder, ov_config=dict(config), **options)
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.numpy()


def precisions(model: ov.Model) -> set[str]:
    return {node.get_attributes()["precision"] for node in model.get_ops() if is_operation(node)}


def group_sizes(model: ov.Model) -> set[str]:
    return {node.get_attributes()["activation_group_size"] for node in model.get_ops() if is_operation(node)}


# What OpenVINO takes for f32, and what it does not.
F32 = (
    {"INFERENCE_PRECISION_HINT": "f32"},
    {"INFERENCE_PRECISION_HINT": "FP32"},
    {"INFERENCE_PRECISION_HINT": ov.Type.f32},
    {hints.inference_precision: ov.Type.f32},
    {"INFERENCE_PRECISION_HINT": "dynamic"},
    {"EXECUTION_MODE_HINT": "ACCURACY"},
    {hints.execution_mode: hints.ExecutionMode.ACCURACY},
    {"DEVICE_PROPERTIES": {"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}},
)
NOT_F32 = (
    None,
    {},
    {"EXECUTION_MODE_HINT": "PERFORMANCE"},
    {"PERFORMANCE_HINT": "LATENCY"},
    {"INFERENCE_PRECISION_HINT": "bf16"},
    {"INFERENCE_PRECISION_HINT": "bf16", "EXECUTION_MODE_HINT": "ACCURACY"},
    {"INFERENCE_PRECISION_HINT": "f16"},
)


@pytest.mark.parametrize("config", F32, ids=str)
def test_every_spelling_of_f32_is_understood(config: dict[str, Any]) -> None:
    assert preferred_precision(config) == "f32"


@pytest.mark.parametrize("config", NOT_F32, ids=str)
def test_f32_is_what_was_asked_for_only(config: dict[str, Any] | None) -> None:
    assert preferred_precision(config) in ("bf16", "split")


def test_the_precision_of_half_floats_is_not_that_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_inference_precision", lambda config: ov.Type.f16)  # some CPUs take bf16 instead
    assert preferred_precision({"INFERENCE_PRECISION_HINT": "f16"}) == "split"


@pytest.mark.parametrize("hinted", [ov.Type.f32, ov.Type.bf16])
def test_a_cpu_without_bf16_answers_f32_where_nobody_asked(hinted: ov.Type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_prefers_bf16", lambda: False)
    monkeypatch.setattr(arithmetic, "_inference_precision", lambda config: hinted)
    assert preferred_precision({}) == preferred_precision({"EXECUTION_MODE_HINT": "PERFORMANCE"}) == "split"
    assert preferred_precision({"INFERENCE_PRECISION_HINT": "?"}) == ("f32" if hinted == ov.Type.f32 else "split")


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({}, arithmetic.DEFAULT_GROUP_SIZE),
        ({"PERFORMANCE_HINT": "LATENCY"}, arithmetic.DEFAULT_GROUP_SIZE),
        ({"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}, 0),
        ({"DYNAMIC_QUANTIZATION_GROUP_SIZE": 32}, 32),
        ({"DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"}, 64),
        ({"DYNAMIC_QUANTIZATION_GROUP_SIZE": "1"}, 16),
        ({"DYNAMIC_QUANTIZATION_GROUP_SIZE": str(2**64 - 1)}, 256),  # OpenVINO's "per channel"
        ({"DEVICE_PROPERTIES": {"CPU": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}}}, 0),
        ({"EXECUTION_MODE_HINT": "ACCURACY"}, 0),
    ],
    ids=str,
)
def test_groups_of_activations_are_as_openvino_is_told(
    small_sparse: Path, small_fused: Path, config: dict[str, Any], size: int
) -> None:
    asked_for_nothing = size == arithmetic.DEFAULT_GROUP_SIZE
    for folder in (small_sparse, small_fused):
        model = OVModelForCausalLM.from_pretrained(folder, compile=False)
        held = group_sizes(model.model)
        made = group_sizes(fused_clone(model.model, ov_config=config))
        assert made == (held if held and asked_for_nothing else {str(size)})


def test_a_group_size_of_the_core_counts(fresh_core: ov.Core) -> None:
    fresh_core.set_property("CPU", {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "64"})
    assert arithmetic.preferred_group_size() == 64


def test_what_openvino_does_not_know_is_its_error(small_fused: Path) -> None:
    for name in ("float32", "f33"):
        with pytest.raises(RuntimeError, match=name):
            logits(small_fused, {"INFERENCE_PRECISION_HINT": name})


def test_properties_of_the_core_count(fresh_core: ov.Core) -> None:
    fresh_core.set_property("CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})
    assert preferred_precision() == "f32"


@pytest.mark.parametrize("config", [EXACT, EXACT | {"INFERENCE_PRECISION_HINT": ov.Type.f32}], ids=["text", "type"])
@pytest.mark.parametrize("compile_only", [False, True])
def test_a_hint_of_f32_is_obeyed(small_sparse: Path, small_fused: Path, compile_only: bool, config: dict) -> None:
    expected = logits(small_sparse, config)
    np.testing.assert_array_equal(logits(small_fused, config, compile_only=compile_only), expected)


def test_saving_again_writes_the_precision_that_was_loaded(small_fused: Path, tmp_path: Path) -> None:
    model = OVModelForCausalLM.from_pretrained(small_fused, ov_config=dict(EXACT))
    assert precisions(fused_clone(model.model, ov_config=EXACT)) == {"f32"}
    assert precisions(model.model) == {"bf16"}
    model.save_pretrained(tmp_path)
    assert read_fused_ir(tmp_path / IR).precisions == {"bf16"}


def test_precisions_do_not_share_an_entry_of_the_model_cache(small_fused: Path, tmp_path: Path) -> None:
    expected = logits(small_fused, EXACT)
    cache = {"CACHE_DIR": str(tmp_path)}
    logits(small_fused, EXACT | {"INFERENCE_PRECISION_HINT": "bf16"} | cache)
    for _ in range(2):  # the second one out of the cache
        np.testing.assert_array_equal(logits(small_fused, EXACT | cache), expected)


def test_an_ir_in_f32_stays_in_f32(small_sparse: Path, tmp_path: Path) -> None:
    fuse_folder(small_sparse, tmp_path / "f32", precision="f32")
    assert read_fused_ir(tmp_path / "f32" / IR).precisions == {"f32"}
    model = OVModelForCausalLM.from_pretrained(tmp_path / "f32", compile=False)
    assert precisions(fused_clone(model.model, ov_config={"INFERENCE_PRECISION_HINT": "bf16"})) == {"f32"}


@pytest.mark.parametrize("compile_only", [False, True])
def test_a_fused_ir_in_a_subfolder_or_of_another_name(
    small_fused: Path, tmp_path: Path, fresh_core: ov.Core, compile_only: bool
) -> None:
    shutil.copytree(small_fused, tmp_path / "fused")
    expected = logits(tmp_path, EXACT, subfolder="fused", compile_only=compile_only)
    modeling.extend_core.cache_clear()
    modeling_base.core = ov.Core()  # undone by the fixture
    for suffix in (".xml", ".bin"):
        (tmp_path / "fused" / IR).with_suffix(suffix).rename(tmp_path / f"fused/mine{suffix}")
    found = logits(tmp_path / "fused", EXACT, file_name="mine.xml", compile_only=compile_only)
    np.testing.assert_array_equal(found, expected)


def test_a_fused_folder_without_a_compiler_says_so(
    small_fused: Path, tmp_path: Path, fresh_core: ov.Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("OPTIMUM_SCAP_CACHE", str(tmp_path))
    with pytest.raises(ExtensionBuildError, match="cannot be read without the extension: .*no-such-compiler"):
        OVModelForCausalLM.from_pretrained(small_fused)


@pytest.mark.parametrize("compile_only", [False, True])
def test_an_ir_with_a_byte_that_is_no_text_is_an_error_in_words(
    small_fused: Path, tmp_path: Path, compile_only: bool
) -> None:
    folder = shutil.copytree(small_fused, tmp_path / "fused")
    content = (folder / IR).read_bytes()
    (folder / IR).write_bytes(content.replace(b'type="SCAPFeedForward"', b'type="SCAP\xe9eedForward"'))
    with pytest.raises(RuntimeError, match="SCAP\ufffdeedForward"):
        OVModelForCausalLM.from_pretrained(folder, compile_only=compile_only)


def test_an_error_without_words_says_what_is_no_text(tmp_path: Path) -> None:
    """What OpenVINO's error about such an IR is on Python 3.11.2."""
    file = tmp_path / IR
    file.write_bytes(b'<net><layer type="SCAP\xe9x"/></net>')
    assert 'openvino_model.xml holds what is no text: <net><layer type="SCAP\ufffdx"/></net>' in str(
        readable(RuntimeError(), file)
    )
    file.write_text("<net/>")
    empty, said = RuntimeError(), RuntimeError("cannot")
    assert readable(empty, file) is empty and readable(said, file) is said


def test_model_files_are_those_that_optimum_intel_takes_for_one(tmp_path: Path) -> None:
    names = ("openvino_model.xml", "my_openvino_language_model.xml", "part/openvino_encoder_model.xml")
    others = ("openvino_tokenizer.xml", "openvino_detokenizer.xml", "model.xml", "openvino_model.bin")
    (tmp_path / "part").mkdir()
    for name in (*names, *others):
        (tmp_path / name).touch()
    assert {str(path.relative_to(tmp_path)) for path in model_files(tmp_path)} == set(names)


def test_info_reads_a_fused_folder_without_the_extension(
    small_sparse: Path, small_fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("OPTIMUM_SCAP_CACHE", str(tmp_path))
    assert read_folder_parameters(small_fused) == read_folder_parameters(small_sparse)
    result = optimum_cli_in_process("scap", "info", small_fused, "--json", tmp_path / "parameters.json")
    assert result.returncode == 0, result.stderr
    assert "6 layers" in result.stdout and "compute in bf16" in result.stdout
    assert (tmp_path / "parameters.json").is_file()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"<?xml", b'<!DOCTYPE net [<!ENTITY a "aaaa">]><?xml', "cannot be read"),
        (b'<?xml version="1.0"?>', b'<!DOCTYPE net [<!ENTITY a "aaaa">]>', "declares a document type"),
        (b"</net>", b"", "cannot be read"),
        (b"&quot;layers&quot;", b"&quot;lairs&quot;", "SCAP parameters are damaged: "),
        (b"<optimum_scap>\n", b"<optimum_scap>\n<was>\n</was>\n", None),
        (b'<parameters value="{', b'<parameters value="', "SCAP parameters are damaged"),
        (b"<parameters", b"<others", "holds no SCAP parameters: it is fused, but says nothing of its thresholds"),
    ],
)
def test_the_xml_of_a_fused_ir_is_read_with_care(
    old: bytes, new: bytes, message: str | None, small_fused: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(small_fused, tmp_path / "fused")
    content = (folder / IR).read_bytes()
    assert old in content
    (folder / IR).write_bytes(content.replace(old, new))
    if message is None:
        assert len(read_folder_parameters(folder)[IR].layers) == 6
        return
    with pytest.raises(SCAPError, match=message) as caught:
        read_folder_parameters(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", ["fuse", "apply", "benchmark", "baseline"])
def test_commands_that_need_the_portable_model_refuse_a_fused_one(
    command: str, small_sparse: Path, small_fused: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = {
        "fuse": ("fuse", small_fused, output),
        "apply": ("apply", small_fused, output, "--scap", "0.5", "--scap-dataset", __file__),
        "benchmark": ("benchmark", small_fused),
        "baseline": ("benchmark", small_sparse, "--baseline", small_fused),
    }[command]
    result = optimum_cli_in_process("scap", *arguments)
    assert result.returncode == 1 and not output.exists()
    (line,) = [line for line in result.stderr.splitlines() if "error:" in line]
    assert "is fused, it holds the C++ operations: give the folder that it was fused from" in line
    assert "TRACEBACK" not in line


def test_the_command_fuses_with_the_precision_that_is_asked_for(small_sparse: Path, tmp_path: Path) -> None:
    result = optimum_cli_in_process("scap", "fuse", small_sparse, tmp_path / "f32", "--precision", "f32")
    assert result.returncode == 0, result.stderr
    assert "INFERENCE_PRECISION_HINT" not in result.stdout
    assert is_fused(tmp_path / "f32" / IR) and read_fused_ir(tmp_path / "f32" / IR).precisions == {"f32"}
    result = optimum_cli_in_process("scap", "fuse", small_sparse, tmp_path / "default")
    (precision,) = read_fused_ir(tmp_path / "default" / IR).precisions
    assert precision == preferred_precision()
    assert f"compute in {precision}, whatever INFERENCE_PRECISION_HINT" in result.stdout
    check_is_portable(small_sparse)


def test_the_precision_of_a_fused_export_needs_one(tmp_path: Path) -> None:
    for flags, needed in ((["--scap", "0.5"], "--scap-fused"), ([], "--scap")):
        result = optimum_cli_in_process(
            "export", "openvino", "-m", tmp_path, *flags, "--scap-fused-precision", "f32", tmp_path / "out"
        )
        assert result.returncode == 1
        assert f"--scap-fused-precision needs {needed}" in result.stderr
