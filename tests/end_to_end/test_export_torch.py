"""From a model to a sparse PyTorch checkpoint by one command, and the checkpoint in fresh processes."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import optimum_cli, optimum_cli_in_process
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from settled import is_settled
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from optimum_scap import SCAPConfig, SCAPError, load_parameters, sparsify_activations
from optimum_scap.data.text import token_windows
from optimum_scap.evaluation.report import Report
from optimum_scap.openvino.inference import EXACT
from optimum_scap.openvino.threshold_ops import find_threshold_ops
from optimum_scap.torch.backend import measure_sparsity, pruned_layers
from optimum_scap.torch.checkpoint import kernel_shapes


SMALL = ("--scap-num-samples", "8", "--scap-seq-len", "128", "--device", "cpu", "--dtype", "float32")

PROMPT = "The Eiffel Tower is in"
TASK = "text-generation-with-past"

LOGITS = """
import sys
import torch, safetensors.torch
{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(100, 140)[None]
with torch.no_grad():
    logits = {{"many": model(ids).logits, "one": model(ids[:, :1]).logits}}
safetensors.torch.save_file(logits, sys.argv[2])
"""

PIPELINE = """
import sys
import optimum_scap
from transformers import pipeline
generate = pipeline("text-generation", model=sys.argv[1])
print(sum("SCAPLinear" in type(module).__name__ for module in generate.model.modules()), "pruned layers")
print(generate("The Eiffel Tower is in", max_new_tokens=8, do_sample=False)[0]["generated_text"])
"""


@pytest.fixture(scope="module")
def sparse_torch(smollm2: Path, texts: tuple[Path, Path], workspace: Path) -> Path:
    output = workspace / "sparse-torch"
    spec = ("--scap", "up=0.35,gate=0.35,down=0.55", "--scap-mode", "down=median", "--scap-dataset", texts[0])
    result = optimum_cli("export", "torch", "-m", smollm2, *spec, *SMALL, output)
    assert result.returncode == 0, result.stderr
    return output


def run(script: str, *arguments: str | Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def fresh_logits(folder: Path, output: Path, imports: str = "import optimum_scap") -> dict[str, torch.Tensor]:
    run(LOGITS.format(imports=imports), folder, output)
    with safe_open(output, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_every_layer_realizes_its_target(sparse_torch: Path, texts: tuple[Path, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(sparse_torch)
    tokenizer = AutoTokenizer.from_pretrained(sparse_torch)
    assert len(pruned_layers(model)) == 90
    windows = token_windows(texts[0], tokenizer, 8, 128)
    realized = measure_sparsity(model, [{"input_ids": torch.tensor([window["input_ids"]])} for window in windows])
    for path, module in pruned_layers(model).items():
        assert realized[path] == pytest.approx(module.scap_parameters.target_sparsity, abs=0.01), path


def test_fresh_processes_agree_to_the_bit(
    sparse_torch: Path, smollm2: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    before_import = fresh_logits(sparse_torch, tmp_path / "a.safetensors")
    after_import = fresh_logits(
        sparse_torch, tmp_path / "b.safetensors", "from transformers import AutoModelForCausalLM\nimport optimum_scap"
    )
    dense_model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    sparsify_activations(dense_model, load_parameters_of(sparse_torch, tmp_path))
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        expected = {"many": dense_model(ids).logits, "one": dense_model(ids[:, :1]).logits}
    for name, logits in expected.items():
        assert torch.equal(before_import[name], logits) and torch.equal(after_import[name], logits)


def load_parameters_of(folder: Path, tmp_path: Path, layers: int = 90, blocks: int = 30):
    result = optimum_cli("scap", "info", folder, "--json", tmp_path / "parameters.json")
    assert result.returncode == 0, result.stderr
    assert f"{layers} layers" in result.stdout and result.stdout.count("mlp.down_proj") == blocks
    return load_parameters(tmp_path / "parameters.json")


def test_the_dense_model_is_still_in_there(sparse_torch: Path, smollm2: Path, tmp_path: Path) -> None:
    """A loader that knows nothing of SCAP gets the dense model; what SCAP adds is a few kilobytes of config.json."""
    found = fresh_logits(sparse_torch, tmp_path / "a.safetensors", "")
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)(torch.arange(100, 140)[None]).logits
    assert torch.equal(found["many"], dense)
    with (
        safe_open(sparse_torch / "model.safetensors", "pt") as ours,
        safe_open(smollm2 / "model.safetensors", "pt") as theirs,
    ):
        assert sorted(ours.keys()) == sorted(theirs.keys())
        for name in ours.keys():  # noqa: SIM118
            assert ours.get_slice(name).get_shape() == theirs.get_slice(name).get_shape()
    assert (sparse_torch / "config.json").stat().st_size < 32 * 1024


@pytest.mark.slow
def test_pipelines(sparse_torch: Path) -> None:
    model, tokenizer = (cls.from_pretrained(sparse_torch) for cls in (AutoModelForCausalLM, AutoTokenizer))
    tokens = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    expected = tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert run(PIPELINE, sparse_torch).endswith(f"90 pruned layers\n{expected}\n")


def test_info_of_a_checkpoint_needs_no_openvino(
    sparse_torch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optimum_scap.openvino.files", None)  # as where OpenVINO is not installed
    result = optimum_cli_in_process("scap", "info", sparse_torch, "--json", tmp_path / "parameters.json")
    assert result.returncode == 0, result.stderr
    assert len(load_parameters(tmp_path / "parameters.json").layers) == 90


def test_parameters_from_a_file_on_either_backend(tiny: Path, tmp_path: Path) -> None:
    calibration = ("--scap-dataset", tiny / "text.txt", "--scap-num-samples", "2", "--scap-seq-len", "32")
    result = optimum_cli_in_process(
        "export", "torch", "-m", tiny / "hf", "--scap", "up=0.4,down=0.6", *calibration, tmp_path / "calibrated"
    )
    assert result.returncode == 0, result.stderr
    expected = load_parameters_of(tmp_path / "calibrated", tmp_path, 4, 2)
    assert len(expected.layers) == 4
    # the reference's own file says the same in other words
    reference = {
        path: {
            "module_name": path,
            "demode_method": layer.estimator,
            "mode": layer.mode,
            "threshold": layer.threshold,
            "target_sparsity": layer.target_sparsity,
            "hook_type": "pre_hook",
        }
        for path, layer in expected.layers.items()
    }
    (tmp_path / "calibrated_thresholds.json").write_text(json.dumps(reference))
    for file in ("parameters.json", "calibrated_thresholds.json"):
        command = ("export", "torch", "-m", tiny / "hf", "--scap-parameters", tmp_path / file, "--device", "cpu")
        result = optimum_cli_in_process(*command, tmp_path / "torch")
        assert result.returncode == 0, result.stderr
        (tmp_path / "again").mkdir(exist_ok=True)
        assert load_parameters_of(tmp_path / "torch", tmp_path / "again", 4, 2).layers == expected.layers
        command = ("scap", "apply", tiny / "dense", "--scap-parameters", tmp_path / file)
        result = optimum_cli_in_process(*command, tmp_path / "openvino")
        assert result.returncode == 0, result.stderr
        result = optimum_cli_in_process("scap", "info", tmp_path / "openvino", "--json", tmp_path / "openvino.json")
        assert result.returncode == 0, result.stderr
        assert load_parameters(tmp_path / "openvino.json").layers == expected.layers


@pytest.mark.slow
def test_decode_only(smollm2: Path, sparse_torch: Path, tmp_path: Path) -> None:
    file = tmp_path / "parameters.json"
    load_parameters_of(sparse_torch, tmp_path)
    command = ("export", "torch", "-m", smollm2, "--scap-parameters", file, "--scap-apply-to", "decode")
    result = optimum_cli(*command, "--dtype", "float32", "--device", "cpu", tmp_path / "decode")
    assert result.returncode == 0, result.stderr
    found = fresh_logits(tmp_path / "decode", tmp_path / "decode.safetensors")
    sparse = fresh_logits(sparse_torch, tmp_path / "sparse.safetensors")
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)(torch.arange(100, 140)[None]).logits
    torch.testing.assert_close(found["many"], dense, atol=1e-3, rtol=1e-3)
    assert torch.equal(found["one"], sparse["one"])

    from optimum.intel import OVModelForCausalLM

    command = ("export", "openvino", "-m", tmp_path / "decode", "--weight-format", "fp32", "--task", TASK)
    result = optimum_cli(*command, tmp_path / "openvino")
    assert result.returncode == 0, result.stderr
    model = OVModelForCausalLM.from_pretrained(tmp_path / "openvino", ov_config=EXACT)
    ops = find_threshold_ops(model.model)
    assert len(ops) == 90 and all(match.decode_only for match in ops)
    for name, expected in (("many", dense), ("one", sparse["one"])):
        ids = torch.arange(100, 140)[None] if name == "many" else torch.arange(100, 101)[None]
        exported = torch.as_tensor(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
        assert (exported - expected).norm() < 1e-3 * expected.norm(), name


def test_export_to_openvino_keeps_the_thresholds(sparse_torch: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    from optimum.intel import OVModelForCausalLM

    output = tmp_path / "openvino"
    result = optimum_cli("export", "openvino", "-m", sparse_torch, "--weight-format", "fp32", "--task", TASK, output)
    assert result.returncode == 0, result.stderr
    expected = load_parameters_of(sparse_torch, tmp_path)
    model = OVModelForCausalLM.from_pretrained(output, ov_config=EXACT)
    ops = {match.layer.path: match for match in find_threshold_ops(model.model)}
    assert "Unknown quantization type" not in result.stderr
    assert ops.keys() == expected.layers.keys()
    for path, layer in expected.layers.items():
        assert ops[path].criterion.key == (layer.mode, layer.threshold, None)
    assert load_parameters_of(output, tmp_path).layers == expected.layers  # scap info reads the IR, too
    # Both compute the same, unless rounding flips an activation near its threshold: see settled.py.
    torch_model = AutoModelForCausalLM.from_pretrained(sparse_torch)
    ids = AutoTokenizer.from_pretrained(sparse_torch)(texts[1].read_text(), return_tensors="pt")["input_ids"]
    tokens = ids[0, :64, None]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "position_ids": torch.zeros_like(tokens)}
    named = {name: value.numpy() for name, value in inputs.items()} | {"beam_idx": np.arange(64, dtype=np.int32)}
    settled = torch.as_tensor(is_settled(model.model, named, 1e-6))
    assert settled.sum() >= 16
    with torch.no_grad():
        ours = torch_model(tokens).logits[settled]
    theirs = torch.as_tensor(model(**inputs).logits)[settled]
    assert ((ours - theirs).norm(dim=-1) < 1e-3 * ours.norm(dim=-1)).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scap", "0.4", "--scap-parameters", "x.json"], "not allowed with"),
        (["--scap-parameters", "{parameters}", "--scap-mode", "median"], "--scap-mode cannot be used with"),
        (["--scap", "qkv=0.4", "--scap-dataset", "{text}"], "no fully connected layer is left"),
        (["--scap", "0.4", "--task", "no-such-task", "--scap-dataset", "{text}"], "--task"),
        (["--scap-parameters", "{unknown}"], "layer model.layers.77.mlp.up_proj does not exist"),
    ],
)
def test_bad_input_leaves_nothing(
    flags: list[str], message: str, smollm2: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    entry = {"module_name": "", "demode_method": "zero", "mode": 0.0, "threshold": 0.1, "target_sparsity": 0.3}
    files = {
        "parameters": {"model.layers.0.mlp.up_proj": entry},
        "unknown": {"model.layers.77.mlp.up_proj": entry},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    values = {"text": texts[0], **{name: tmp_path / f"{name}.json" for name in files}}
    output = tmp_path / "deep" / "output"
    result = optimum_cli_in_process(
        "export", "torch", "-m", smollm2, *(flag.format(**values) for flag in flags), output
    )
    assert result.returncode in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not output.parent.exists()


def test_damaged_checkpoints(sparse_torch: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(sparse_torch, folder)
    config = json.loads((folder / "config.json").read_text())
    layer = config["quantization_config"]["layers"]["model.layers.3.mlp.up_proj"]
    layer["threshold"] = -1.0
    (folder / "config.json").write_text(json.dumps(config))
    result = optimum_cli("scap", "info", folder)
    assert result.returncode == 1 and "layers.model.layers.3.mlp.up_proj.threshold" in result.stderr
    with pytest.raises(SCAPError, match=r"model\.layers\.3\.mlp\.up_proj\.threshold"):
        AutoModelForCausalLM.from_pretrained(folder)
    result = optimum_cli("export", "torch", "-m", folder, "--scap", "0.4", folder)
    assert result.returncode == 1 and "is the model folder itself" in result.stderr


@pytest.fixture
def tiny_folder(smollm2: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes a folder with a small random model of the kind asked for and SmolLM2's tokenizer."""

    def make(kind: str) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(smollm2)
        sizes = {"vocab_size": len(tokenizer), "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
        if kind == "t5":
            t5 = T5Config(**sizes, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=2)
            model: PreTrainedModel = T5ForConditionalGeneration(t5)
        else:
            llama = LlamaConfig(
                **sizes, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
            )
            model = LlamaForCausalLM(llama)
        model.save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return make


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no tokenizer", "holds no tokenizer"),
        ("half of the weights", "cannot be loaded: Error while deserializing header"),
        ("a weight less", "1 weights are missing, such as model.layers.1.mlp.up_proj.weight"),
        ("another format", "no format but safetensors is read"),
        ("config is a list", "config.json cannot be read"),
        ("wrong type in config", "'hidden_size' expected int"),
        ("quantized", "names the quant_method 'nosuch-1', which transformers"),
    ],
)
def test_damaged_models(
    damage: str, message: str, tiny_folder: Callable[[str], Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, output = tiny_folder("llama"), tmp_path / "output"
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif damage == "half of the weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "a weight less":
        values = load_file(weights)
        del values["model.layers.1.mlp.up_proj.weight"]
        save_file(values, weights, metadata={"format": "pt"})
    elif damage == "another format":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif damage == "config is a list":
        config.write_text("[]")
    elif damage == "wrong type in config":
        config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": "x"}))
    else:
        weights.unlink()
        method = {"quant_method": "nosuch-1"}
        config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": method}))
    command = ("export", "torch", "-m", folder, "--scap", "0.4", "--scap-dataset", texts[0], *SMALL, output)
    result = optimum_cli_in_process(*command)
    assert result.returncode == 1 and message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and str(folder) in result.stderr and not output.exists()


def test_missing_models_are_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for model, message in ((tmp_path / "none", "does not exist"), (tmp_path / "file", "is a file, not a folder")):
        result = optimum_cli_in_process("export", "torch", "-m", model, "--scap", "0.4", tmp_path / "out")
        assert result.returncode == 1 and f"{model} {message}" in result.stderr


def test_an_encoder_and_its_decoder(
    tiny_folder: Callable[[str], Path], texts: tuple[Path, Path], tmp_path: Path
) -> None:
    command = ("export", "torch", "-m", tiny_folder("t5"), "--scap", "0.4", "--scap-dataset", texts[0], *SMALL)
    result = optimum_cli_in_process(*command, tmp_path / "sparse")
    assert result.returncode == 0, result.stderr
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse")
    assert len(pruned_layers(model)) == 4
    assert model.generate(torch.arange(100, 110)[None], max_new_tokens=3).shape[1] > 1


def test_outputs_behind_links(tiny_folder: Callable[[str], Path], texts: tuple[Path, Path], tmp_path: Path) -> None:
    """What a link points to is written, as with any other file, also where it is not there yet."""
    model = tiny_folder("llama")
    (tmp_path / "large disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large disk" / "not yet [1]")
    command = ("export", "torch", "-m", model, "--scap", "0.4", "--scap-dataset", texts[0], *SMALL)
    for _ in range(2):
        result = optimum_cli_in_process(*command, tmp_path / "link")
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "link").is_symlink()
        assert [path.name for path in (tmp_path / "large disk").iterdir()] == ["not yet [1]"]
    result = optimum_cli_in_process(*command, model / "config.json" / "below")
    assert result.returncode == 1 and "is not a folder" in result.stderr
    result = optimum_cli_in_process(*command, tmp_path / ("long" * 62))
    assert result.returncode == 1 and "cannot be created: [Errno 36]" in result.stderr


def test_a_sparse_checkpoint_is_not_sparsified_again(
    sparse_torch: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    result = optimum_cli(
        *("export", "torch", "-m", sparse_torch, "--scap", "0.4", "--scap-dataset", texts[0], *SMALL), tmp_path / "out"
    )
    assert result.returncode == 1 and "sparse already" in result.stderr
    command = ("export", "openvino", "-m", sparse_torch, "--scap", "0.4", tmp_path / "out")
    result = optimum_cli_in_process(*command)
    assert result.returncode == 1 and "export it without --scap, its thresholds come along" in result.stderr
    assert not (tmp_path / "out").exists()


def test_text_is_found_by_the_model_itself(tiny: Path) -> None:
    """The tokenizer comes from where the model was loaded; `auto` is text that the model generates."""
    by_file = AutoModelForCausalLM.from_pretrained(tiny / "hf", dtype=torch.float32)
    sparsify_activations(by_file, SCAPConfig.from_spec("0.4", num_samples=4, seq_len=64), tiny / "text.txt")
    generated = AutoModelForCausalLM.from_pretrained(tiny / "hf", dtype=torch.float32)
    sparsify_activations(generated, SCAPConfig.from_spec("0.4", num_samples=4))
    for model in (by_file, generated):
        thresholds = [module.scap_threshold for module in pruned_layers(model).values()]
        assert len(thresholds) == 6 and all(0 < threshold < 10 for threshold in thresholds)


@pytest.mark.slow
def test_benchmark_and_tune(sparse_torch: Path, tmp_path: Path) -> None:
    size = ("--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "1")
    result = optimum_cli("scap", "benchmark", sparse_torch, *size, "--json", tmp_path / "speed.json")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "speed.json").read_text())
    report = Report.model_validate(found)
    on_gpu = torch.cuda.is_available()  # elsewhere dense layers are what they were
    names = ["dense", *(["SCAP, dense layers stock"] if on_gpu else []), "SCAP"]
    assert list(report.contestants) == names and report.baseline == "dense"
    assert [quantity.name for quantity in report.quantities] == [
        "decode",
        "prefill of 16 tokens",
        "peak memory",
        "load",
    ]
    for quantity in report.quantities:
        assert list(quantity.values) == names and all(value > 0 for (value,) in quantity.values.values())
    assert all(value > 400 for (value,) in report.quantity("peak memory").values.values())
    assert report.sparsity["SCAP"].by_role["up"] == pytest.approx(0.35, abs=0.1)
    assert ("gpu" in report.machine) == on_gpu and report.settings["repeats"] == 1
    # one launch for gate and up, one for down
    assert kernel_shapes(sparse_torch) == {torch.float32: {(576, (1536, 1536)), (1536, (576,))}}
    if not torch.cuda.is_available():
        result = optimum_cli("scap", "tune", sparse_torch)
        assert result.returncode == 1 and "tuning needs a GPU" in result.stderr
    result = optimum_cli("scap", "benchmark", sparse_torch, "--json", tmp_path / "missing" / "speed.json")
    assert result.returncode == 1 and "--json: the folder of" in result.stderr


@pytest.mark.slow
def test_lm_eval_runs_on_a_checkpoint(sparse_torch: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install optimum-scap[eval]")
    questions = [
        {"question": f"The capital of {country} is", "choices": ["Paris", "Rome", "Berlin"], "answer": index}
        for index, country in enumerate(("France", "Italy", "Germany"))
    ]
    (tmp_path / "capitals.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "capitals.yaml").write_text(
        f"""
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path}/capitals.jsonl"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    command = [sys.executable, "-m", "optimum_scap.evaluation.lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={sparse_torch},dtype=float32", "--include_path", str(tmp_path)]
    result = subprocess.run(
        [*command, "--tasks", "capitals", "--output_path", str(tmp_path / "results")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "Unknown quantization type" not in result.stderr
    found = json.loads(next((tmp_path / "results").rglob("results_*.json")).read_text())
    assert found["results"]["capitals"]["acc,none"] > 0.6
