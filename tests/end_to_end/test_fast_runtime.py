"""`from optimum_scap import OVModelFor...` on a real model."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
import optimum.intel
import pytest
import torch
from command_line import optimum_cli
from cpu import ORDER_OF_SUMS, knows_the_order_of_sums
from settled import is_settled
from transformers import AutoTokenizer

import optimum_scap
from optimum_scap.evaluation.report import Report
from optimum_scap.evaluation.speed import load, openvino_contestants
from optimum_scap.openvino.arithmetic import preferred_precision
from optimum_scap.openvino.extension.build import build_extension, find_compiler, openvino_flags
from optimum_scap.openvino.extension.packing import is_fast_for_dense_int4
from optimum_scap.openvino.inference import EXACT
from optimum_scap.openvino.threshold_ops import find_threshold_ops


PROMPTS = ("The capital of France is", "Water boils at", "The largest planet is")


def assert_every_token_is_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    errors = torch.linalg.norm(found - expected, dim=-1) / torch.linalg.norm(expected, dim=-1)
    assert errors.max() < 1e-3


def compiled_operations(request) -> set[str]:
    compiled = request.get_compiled_model() if hasattr(request, "get_compiled_model") else request
    return {node.get_friendly_name().rpartition("/")[2] for node in compiled.get_runtime_model().get_ops()}


def count_operations(request, kind: str) -> int:
    return sum(name.startswith(kind) for name in compiled_operations(request))


def test_it_is_a_drop_in_and_saves_the_portable_model(sparse_int8: Path, tmp_path: Path) -> None:
    model = optimum_scap.OVModelForCausalLM.from_pretrained(sparse_int8)
    assert isinstance(model, optimum.intel.OVModelForCausalLM)
    assert "SCAPFeedForward" in compiled_operations(model.request)
    assert len(find_threshold_ops(model.model)) == 90
    tokenizer = AutoTokenizer.from_pretrained(sparse_int8)
    for prompts in (PROMPTS[0], list(PROMPTS)):  # one row, and a padded batch
        tokenizer.padding_side = "left"
        tokens = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=8)
        assert tokens.shape[0] == (1 if isinstance(prompts, str) else 3)
    model.save_pretrained(tmp_path)
    saved = ov.Core().read_model(tmp_path / "openvino_model.xml")
    assert len(find_threshold_ops(saved)) == 90


def test_a_dense_model_is_compiled_as_it_is(dense_int8: Path) -> None:
    model = optimum_scap.OVModelForCausalLM.from_pretrained(dense_int8)
    assert not any(name.startswith("SCAP") for name in compiled_operations(model.request))


def test_greedy_text_is_that_of_the_portable_model(sparse_int8: Path) -> None:
    """In f32 the sums have the same order, see extension/cpp/exact.hpp; tests/openvino/test_f32_bits.py says where."""
    tokenizer = AutoTokenizer.from_pretrained(sparse_int8)
    config = EXACT | {"INFERENCE_NUM_THREADS": "2"}  # with many threads OpenVINO splits sums in another way
    stock = optimum.intel.OVModelForCausalLM.from_pretrained(sparse_int8, ov_config=dict(config))
    fast = optimum_scap.OVModelForCausalLM.from_pretrained(sparse_int8, ov_config=dict(config))
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        logits = [model(**inputs).logits[0].numpy().copy() for model in (stock, fast)]
        errors = np.linalg.norm(logits[1] - logits[0], axis=-1) / np.linalg.norm(logits[0], axis=-1)
        assert errors[0] < 1e-3
        if knows_the_order_of_sums():
            np.testing.assert_array_equal(*logits, ORDER_OF_SUMS)
            options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
            texts = [model.generate(**inputs, **options)[0].tolist() for model in (stock, fast)]
            assert texts[0] == texts[1]


@pytest.mark.slow
def test_perplexity_is_that_of_the_portable_model(sparse_int8: Path, texts: tuple[Path, Path]) -> None:
    """In f32: by default the portable model rounds activations to one byte, and is up to 2 % off itself."""
    from optimum_scap.evaluation.perplexity import perplexity

    tokenizer = AutoTokenizer.from_pretrained(sparse_int8)
    text = texts[1].read_text(encoding="utf-8")
    models = (
        optimum.intel.OVModelForCausalLM.from_pretrained(sparse_int8, ov_config=dict(EXACT)),
        optimum_scap.OVModelForCausalLM.from_pretrained(sparse_int8, ov_config=dict(EXACT)),
        optimum_scap.OVModelForCausalLM.from_pretrained(sparse_int8),
    )
    portable, exact, default = (perplexity(model, tokenizer, text, max_tokens=3072) for model in models)
    assert exact == pytest.approx(portable, rel=0.005)
    assert default == pytest.approx(portable, rel=0.02)


def test_without_a_compiler_it_warns_once_and_runs(sparse_int8: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("OPTIMUM_SCAP_CACHE", str(tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = optimum_scap.OVModelForCausalLM.from_pretrained(sparse_int8)
    messages = [str(item.message) for item in caught if "SCAP runs with" in str(item.message)]
    assert len(messages) == 1 and "no-such-compiler" in messages[0]
    ids = torch.tensor([[1, 2, 3]])
    assert model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape[:2] == (1, 3)


def test_a_process_may_end_with_a_model_alive(sparse_int8: Path) -> None:
    """The extension must not be unloaded before the operations that it made."""
    code = f"import optimum_scap; model = optimum_scap.OVModelForCausalLM.from_pretrained({str(sparse_int8)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_encoder_and_an_encoder_decoder(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    bert = BertConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    BertModel(bert).save_pretrained(tmp_path / "bert")
    encoder = optimum_scap.OVModelForFeatureExtraction.from_pretrained(tmp_path / "bert", export=True, compile=False)
    rng = np.random.default_rng(0)
    names = ("input_ids", "attention_mask", "token_type_ids")
    ones, zeros = np.ones((1, 24), dtype=np.int64), np.zeros((1, 24), dtype=np.int64)
    data = [dict(zip(names, (rng.integers(0, 99, (1, 24)), ones, zeros), strict=True)) for _ in range(8)]
    optimum_scap.sparsify_activations(encoder, "up=0.4,down=0.5", data)
    encoder.save_pretrained(tmp_path / "sparse")
    # Masks that no rounding changes, see settled.py: else one channel more would be a visible difference.
    inputs = {
        name: torch.from_numpy(value)
        for name, value in next(each for each in data if is_settled(encoder.model, each, 1e-5).all()).items()
    }
    expected = optimum.intel.OVModelForFeatureExtraction.from_pretrained(tmp_path / "sparse", ov_config=dict(EXACT))
    found = optimum_scap.OVModelForFeatureExtraction.from_pretrained(tmp_path / "sparse", ov_config=dict(EXACT))
    assert any(name.startswith("SCAP") for name in compiled_operations(found.request))
    assert_every_token_is_close(found(**inputs).last_hidden_state, expected(**inputs).last_hidden_state)

    t5 = T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    model = optimum_scap.OVModelForSeq2SeqLM.from_pretrained(tmp_path / "t5", export=True, compile=False)
    calibration = [{"input_ids": rng.integers(0, 99, (1, 24)), "attention_mask": ones} for _ in range(8)]
    optimum_scap.sparsify_activations(model, "up=0.4,down=0.5", {"encoder": calibration})
    model.compile()
    assert any(name.startswith("SCAP") for name in compiled_operations(model.encoder.request))
    # Only the encoder is run: stock optimum-intel 2.2 cannot run this T5's decoder either.
    model.save_pretrained(tmp_path / "sparse-t5")
    stock = optimum.intel.OVModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse-t5", ov_config=dict(EXACT))
    fast = optimum_scap.OVModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse-t5", ov_config=dict(EXACT))
    settled = next(each for each in calibration if is_settled(stock.encoder.model, each, 1e-5).all())
    ids, mask = (torch.from_numpy(settled[name]) for name in ("input_ids", "attention_mask"))
    states = [part.encoder(input_ids=ids, attention_mask=mask).last_hidden_state for part in (stock, fast)]
    assert_every_token_is_close(states[1], states[0])


GENAI = """
import json, sys
import openvino_genai
folder, library, prompts = json.loads(sys.argv[1])
exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
pipeline = openvino_genai.LLMPipeline(folder, "CPU", extensions=[library], ATTENTION_BACKEND="SDPA", **exact)
options = {"max_new_tokens": 12, "do_sample": False, "apply_chat_template": False}
print(json.dumps([pipeline.generate(prompt, **options) for prompt in prompts]))
"""


def test_openvino_genai_runs_the_fused_ir_and_gives_the_same_tokens(sparse_int8: Path, tmp_path: Path) -> None:
    """It cannot change the operations' precision, which the classes of this package do when they load the IR."""
    result = optimum_cli("scap", "fuse", sparse_int8, tmp_path / "fused", "--precision", "f32")
    assert result.returncode == 0, result.stderr
    library = optimum_cli("scap", "build-extension").stdout.strip()
    assert Path(library).is_file() and library in result.stdout
    arguments = json.dumps([str(tmp_path / "fused"), library, PROMPTS])
    run = subprocess.run([sys.executable, "-c", GENAI, arguments], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout.splitlines()[-1])
    tokenizer = AutoTokenizer.from_pretrained(sparse_int8)
    model = optimum_scap.OVModelForCausalLM.from_pretrained(tmp_path / "fused", ov_config=dict(EXACT))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(tokens, skip_special_tokens=True) == answer


def test_a_c_plus_plus_program_runs_the_fused_ir(sparse_int8: Path, tmp_path: Path) -> None:
    result = optimum_cli("scap", "fuse", sparse_int8, tmp_path / "fused")
    assert result.returncode == 0, result.stderr
    source = Path(__file__).parents[2] / "examples" / "cpp" / "run_fused_model.cpp"
    program = tmp_path / "run_fused_model"
    command = [*find_compiler(), "-O1", "-std=c++17", source, "-o", program, *openvino_flags()]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    model_file, library = tmp_path / "fused" / "openvino_model.xml", build_extension()
    prompt = AutoTokenizer.from_pretrained(sparse_int8)(PROMPTS[0])["input_ids"]
    run = subprocess.run(
        [program, model_file, library, "12", *map(str, prompt)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    model = optimum_scap.OVModelForCausalLM.from_pretrained(tmp_path / "fused")
    ids = torch.tensor([prompt])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    tokens = expected[0, len(prompt) :].tolist()  # generate() ends with the text, the program does not
    assert len(tokens) >= 8 and [int(token) for token in run.stdout.split()][: len(tokens)] == tokens
    without_library = subprocess.run([program, model_file, tmp_path / "none.so", "1", "5"], capture_output=True)
    assert without_library.returncode == 1 and b"none.so" in without_library.stderr


def test_benchmark_prints_and_writes_what_it_measured(tiny: Path, tmp_path: Path) -> None:
    result = optimum_cli(
        *("scap", "benchmark", tiny / "sparse", "--baseline", tiny / "dense", "--json", tmp_path / "result.json"),
        *("--prompt-tokens", "16", "4", "--new-tokens", "8", "--repeats", "2"),
    )
    assert result.returncode == 0, result.stderr
    measured = Report.model_validate_json((tmp_path / "result.json").read_text())
    # no layer has 4-bit weights: without a column for dense layers
    assert list(measured.contestants) == ["dense", "SCAP", "SCAP, portable"] and measured.baseline == "dense"
    rows = ["decode", "prefill of 16 tokens", "prefill of 4 tokens", "peak memory", "load", "load and first token"]
    assert [quantity.name for quantity in measured.quantities] == rows
    for name in measured.contestants:
        assert len(measured.quantity("decode").values[name]) == 2 and name in result.stdout
        assert measured.quantity("peak memory").values[name][0] > 100
        load_seconds, with_token = (measured.quantity(row).values[name][0] for row in rows[-2:])
        assert 0 < load_seconds < with_token
    sparsity = measured.sparsity["SCAP"]
    assert sparsity.by_role["down"] == pytest.approx(0.5, abs=0.05) and len(sparsity.layers) == 6
    assert f"cores {measured.machine['cores']}" in result.stdout
    assert measured.settings == {"prompt_tokens": [16, 4], "new_tokens": 8, "repeats": 2}
    refused = optimum_cli("scap", "benchmark", tiny / "dense")
    assert refused.returncode == 1 and "the model is dense" in refused.stderr


@pytest.mark.slow
def test_benchmark_shows_what_stock_dense_layers_leave_of_the_speed_up(tiny: Path, tmp_path: Path) -> None:
    """Attention's layers of 4-bit weights run through the operation, too, where that is faster."""
    for name, option in (("fast", "fast"), ("stock", "stock")):
        model = optimum.intel.OVModelForCausalLM.from_pretrained(tiny / "dense", compile=False)
        model.model = nncf.compress_weights(
            model.model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=32, all_layers=True
        )
        config = optimum_scap.SCAPConfig.from_spec("0.5", dense_layers=option)
        ids = torch.arange(64)[None]
        optimum_scap.sparsify_activations(model, config, [model.prepare_inputs(ids, torch.ones_like(ids))])
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tiny / "dense").save_pretrained(tmp_path / name)
    is_fast = is_fast_for_dense_int4(build_extension()) and preferred_precision() != "f32"
    column = ["SCAP, dense layers stock"] if is_fast else []
    assert list(openvino_contestants(tmp_path / "stock")) == ["SCAP", "SCAP, portable"]
    assert list(openvino_contestants(tmp_path / "fast", portable=False)) == [*column, "SCAP"]
    result = optimum_cli(
        *("scap", "benchmark", tmp_path / "fast", "--baseline", tiny / "dense", "--json", tmp_path / "result.json"),
        *("--prompt-tokens", "4", "--new-tokens", "4", "--repeats", "1"),
    )
    assert result.returncode == 0, result.stderr
    measured = Report.model_validate_json((tmp_path / "result.json").read_text())
    assert list(measured.contestants) == ["dense", *column, "SCAP", "SCAP, portable"]
    assert measured.ratios["decode"].keys() == {*column, "SCAP", "SCAP, portable"}

    counts = {
        dense_layers: count_operations(load(tmp_path / "fast", True, dense_layers=dense_layers).request, "SCAPLinear")
        for dense_layers in ("stock", None)
    }
    assert counts["stock"] == 0 and (counts[None] > 0) == is_fast  # FFNs are SCAPFeedForward
    stock = load(tmp_path / "fast", False, dense_layers="stock")  # optimum-intel's class knows nothing of it
    assert type(stock) is optimum.intel.OVModelForCausalLM


def test_a_dense_folder_cannot_be_fused(dense_int8: Path, tmp_path: Path) -> None:
    result = optimum_cli("scap", "fuse", dense_int8, tmp_path / "out")
    assert result.returncode == 1 and "the model is dense" in result.stderr
    assert not (tmp_path / "out").exists()
