"""A whole model under OpenVINO's options: model cache, streams, inference precisions; and damaged fused IRs."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import openvino as ov
import optimum.intel
import pytest
import torch
from command_line import optimum_cli_in_process

import optimum_scap
from optimum_scap.openvino.extension.build import build_extension
from optimum_scap.openvino.inference import EXACT


@pytest.fixture(scope="module")
def fused(sparse_int8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fused") / "model"
    result = optimum_cli_in_process("scap", "fuse", sparse_int8, output)
    assert result.returncode == 0, result.stderr
    return output


LOAD = """
import json, sys
import numpy as np, torch
from optimum_scap import OVModelForCausalLM
for folder, config, logits in json.loads(sys.argv[1]):
    model = OVModelForCausalLM.from_pretrained(folder, ov_config=config)
    compiled = model.request.get_compiled_model()
    ids = torch.tensor([[1, 2, 3, 4]])
    np.save(logits, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy())
    names = [node.get_friendly_name().rpartition("/")[2] for node in compiled.get_runtime_model().get_ops()]
    print(json.dumps([compiled.get_property("LOADED_FROM_CACHE"), names.count("SCAPFeedForward")]))
"""


def run_python(code: str, *arguments: str) -> list[str]:
    """The lines that `code` prints in a process of its own, which must end well."""
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.slow
def test_the_model_cache(sparse_int8: Path, fused: Path, tmp_path: Path) -> None:
    """The second process takes both models out of the cache, with the operations in them."""
    cached = EXACT | {"CACHE_DIR": str(tmp_path / "cache")}

    def load(folder: Path, config: dict[str, str], name: str) -> list:
        return [str(folder), config, str(tmp_path / f"{folder.name}-{name}.npy")]

    folders = (sparse_int8, fused)
    first = [load(folder, *how) for folder in folders for how in ((EXACT, "without"), (cached, "first"))]
    second = [load(folder, cached, "second") for folder in folders]
    assert [json.loads(line) for line in run_python(LOAD, json.dumps(first))] == [[False, 30]] * 4
    assert [json.loads(line) for line in run_python(LOAD, json.dumps(second))] == [[True, 30]] * 2
    for folder in folders:
        logits = [np.load(tmp_path / f"{folder.name}-{name}.npy") for name in ("without", "first", "second")]
        np.testing.assert_array_equal(logits[1], logits[0])
        np.testing.assert_array_equal(logits[2], logits[0])


GENAI = """
import json, sys
import openvino_genai
folder, library, *caches = sys.argv[1:]
for cache in caches:
    config = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"} | ({"CACHE_DIR": cache} if cache else {})
    pipeline = openvino_genai.LLMPipeline(folder, "CPU", extensions=[library], ATTENTION_BACKEND="SDPA", **config)
    options = {"max_new_tokens": 8, "do_sample": False, "apply_chat_template": False}
    print(json.dumps(pipeline.generate("Water boils at", **options)))
"""


def test_the_model_cache_of_openvino_genai(fused: Path, tmp_path: Path) -> None:
    def written() -> dict[str, int]:
        return {blob.name: blob.stat().st_mtime_ns for blob in (tmp_path / "cache").glob("*.blob")}

    arguments = [str(fused), str(build_extension())]
    answers = run_python(GENAI, *arguments, "", str(tmp_path / "cache"))
    blobs = written()
    answers += run_python(GENAI, *arguments, str(tmp_path / "cache"))
    assert len(answers) == 3 and len(set(answers)) == 1
    # A blob that could not be read would have been written again.
    assert blobs and written() == blobs


def test_compile_only_reads_portable_and_fused_folders(sparse_int8: Path, fused: Path) -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    for folder in (sparse_int8, fused):
        logits = []
        for only in (True, False):
            model = optimum_scap.OVModelForCausalLM.from_pretrained(folder, compile_only=only, ov_config=dict(EXACT))
            compiled = model.request.get_compiled_model() if hasattr(model.request, "get_compiled_model") else None
            names = [node.get_friendly_name() for node in (compiled or model.request).get_runtime_model().get_ops()]
            assert sum(name.endswith("SCAPFeedForward") for name in names) == 30
            logits.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
        assert torch.equal(*logits)


def test_parallel_requests_on_several_streams(fused: Path) -> None:
    """Prefill and decode of different prompts at once give bit for bit what they give one after the other."""
    core = ov.Core()
    core.add_extension(str(build_extension()))
    config = EXACT | {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": "2"}
    compiled = core.compile_model(fused / "openvino_model.xml", "CPU", config)
    assert compiled.get_property("NUM_STREAMS") == 2
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 1000, (1, length)) for length in (1, 40, 7, 1, 3, 23, 1, 16, 2, 1, 90, 5)]

    def inputs(ids: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.shape[1])[None],
            "beam_idx": np.zeros(1, np.int32),
        }

    request = compiled.create_infer_request()
    expected = []
    for ids in prompts:
        request.reset_state()
        expected.append(request.infer(inputs(ids))["logits"].copy())
    found: dict[int, np.ndarray] = {}
    queue = ov.AsyncInferQueue(compiled, 4)
    queue.set_callback(lambda done, index: found.setdefault(index, done.get_tensor("logits").data.copy()))
    for index, ids in enumerate(prompts * 2):
        queue[queue.get_idle_request_id()].reset_state()
        queue.start_async(inputs(ids), index)
    queue.wait_all()
    assert len(found) == 2 * len(prompts)
    for index, logits in found.items():
        np.testing.assert_array_equal(logits, expected[index % len(prompts)])


def first_token_logits(package: ModuleType, folder: Path, hint: str) -> np.ndarray:
    """Of 24 one-token texts. A second token would see through attention which activations the first one kept."""
    config = EXACT | {"INFERENCE_PRECISION_HINT": hint}
    model = package.OVModelForCausalLM.from_pretrained(folder, ov_config=config)
    assert model.request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT").to_string() == hint
    ids = torch.arange(100, 2500, 100)[:, None]
    return np.stack(
        [model(input_ids=row[None], attention_mask=torch.ones_like(row[None])).logits[0, 0].numpy() for row in ids]
    )


def test_inference_precisions(sparse_int8: Path) -> None:
    """At f32 the fused and the portable model agree to rounding. At bf16 rounding moves activations across their
    thresholds, in either model, so that the distance of the portable model from f32 is the measure: the fused one must
    not be further from f32, nor the two from each other. Medians, because a few texts are far off in both."""
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU does not infer in bf16")

    def distance(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
        return np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)

    stock = {hint: first_token_logits(optimum.intel, sparse_int8, hint) for hint in ("f32", "bf16")}
    fast = {hint: first_token_logits(optimum_scap, sparse_int8, hint) for hint in ("f32", "bf16")}
    assert distance(fast["f32"], stock["f32"]).max() < 1e-4
    rounding = np.median(distance(stock["bf16"], stock["f32"]))
    assert 1e-3 < rounding < 0.15
    assert np.median(distance(fast["bf16"], stock["f32"])) < 1.5 * rounding
    assert np.median(distance(fast["bf16"], stock["bf16"])) < 1.5 * rounding


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()  # a link to the intact file
    path.write_bytes(content)


def truncated(name: str, keep: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        rewrite(folder / name, content[: int(len(content) * keep)])

    return damage


def cut(element: str) -> Callable[[Path], None]:
    """The XML ends within the first `element`, wherever that is on this machine."""

    def damage(folder: Path) -> None:
        path = folder / "openvino_model.xml"
        content = path.read_bytes()
        rewrite(path, content[: content.index(element.encode()) + len(element)])

    return damage


def edited(old: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "openvino_model.xml"
        text = path.read_text(encoding="utf-8")
        assert old in text
        rewrite(path, text.replace(old, new, 1).encode())

    return damage


FEED_FORWARD = 'type="SCAPFeedForward" version="optimum_scap"'
# What is damaged, and what the error says.
DAMAGES = (
    (truncated("openvino_model.bin", 0.5), "Incorrect weights in bin file"),
    (truncated("openvino_model.bin", 0.0), "Incorrect weights in bin file"),
    (lambda folder: (folder / "openvino_model.bin").unlink(), "openvino_model.bin"),
    # What OpenVINO says of a torn XML depends on where it is torn: naming the error is up to it, raising one is not.
    (truncated("openvino_model.xml", 0.0), ""),
    (cut("<layers>"), ""),
    (cut(FEED_FORWARD), ""),
    (cut('in_features="57'), ""),
    (cut("</layers>"), ""),
    (edited('in_features="576"', 'in_features="-576"'), "in_features out of range"),
    (edited('in_features="576"', 'in_features="many"'), "in_features must be an integer, got 'many'"),
    (edited('out_features="1536, 1536, 576"', 'out_features="1536, 1536"'), "must all have 2 entries"),
    (edited('weight_types="u8, u8, u8"', 'weight_types="u4, u8, u8"'), "input 1 must be u8"),
    (edited('decode_only="false"', 'decode_only="maybe"'), "decode_only must be one of false, true; got 'maybe'"),
    (edited(FEED_FORWARD, FEED_FORWARD.replace("Forward", "Back")), "Cannot create SCAPFeedBack"),
    (edited(FEED_FORWARD, FEED_FORWARD.replace("FeedForward", "Linear")), "must be u8"),
)

LOAD_DAMAGED = """
import sys
from optimum_scap import OVModelForCausalLM
for folder in sys.argv[1:]:
    try:
        OVModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        print(type(error).__name__, " ".join(str(error).split()))
    else:
        print("loaded")
"""


def test_a_damaged_fused_model_raises_and_does_not_end_the_process(fused: Path, tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(DAMAGES))]
    for folder, (damage, _) in zip(folders, DAMAGES, strict=True):
        shutil.copytree(fused, folder, copy_function=os.link)
        damage(folder)
    lines = run_python(LOAD_DAMAGED, *map(str, folders))
    for line, (_, message) in zip(lines, DAMAGES, strict=True):
        assert line.startswith("RuntimeError") and message in line
