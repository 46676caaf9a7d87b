"""Calibration on torch models of every architecture, and what they are afterwards."""

import copy
from pathlib import Path

import nncf
import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset, DatasetDict, IterableDataset
from tiny_models import CONFIGS, LAYERS, tiny_model, tiny_samples
from torch import nn
from torch.utils.data import DataLoader

from optimum_scap import SCAPConfig, SCAPError, load_parameters, save_parameters, sparsify_activations
from optimum_scap.torch.backend import measure_sparsity, pruned_layers, read_parameters


def auto_class(name: str) -> type:
    heads = {"SequenceClassification": tf.AutoModelForSequenceClassification}
    heads["ImageClassification"] = tf.AutoModelForImageClassification
    return next((cls for head, cls in heads.items() if CONFIGS[name][0].endswith(head)), tf.AutoModelForCausalLM)


def logits_of(model: nn.Module, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**sample).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_modes_of_every_architecture(name: str, tmp_path: Path) -> None:
    """tests/families prunes to zero."""
    model, samples = tiny_model(name), tiny_samples(name)
    sparsify_activations(model, SCAPConfig.from_spec("0.4", mode="median"), samples)
    layers = pruned_layers(model)
    assert len(layers) == CONFIGS[name][2] * LAYERS
    for path, sparsity in measure_sparsity(model, samples).items():
        # OPT, and GPT-NeoX with a ReLU, prune what is zero anyway: then no threshold hits the target exactly
        assert sparsity == pytest.approx(0.4, abs=0.01) or sparsity > 0.4 and name == "opt", path

    before = logits_of(model, samples[0])
    model.save_pretrained(tmp_path)
    again = auto_class(name).from_pretrained(tmp_path, device_map="auto")
    assert type(again) is type(model) and pruned_layers(again).keys() == layers.keys()
    assert torch.equal(logits_of(again, samples[0]), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_decoding_token_by_token_is_the_formula_on_every_path(name: str) -> None:
    """One row runs the sparse operation, many rows the dense product; both must give the same text."""
    model, samples = tiny_model(name), tiny_samples(name)
    sparsify_activations(model, SCAPConfig.from_spec("0.4", mode="median"), samples)
    ids = samples[0]["input_ids"][:1, :24]
    whole = logits_of(model, {"input_ids": ids})
    cache, steps = None, []
    with torch.no_grad():
        for position in range(ids.shape[1]):
            output = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    errors = (torch.cat(steps, 1) - whole).norm(dim=-1) / whole.norm(dim=-1)
    # A channel within rounding of its threshold may flip, and what comes after it moves; most tokens must be exact.
    assert errors.median() < 1e-4


def test_sites_are_shared_by_layers_that_read_the_same_tensor() -> None:
    model = tiny_model("llama")
    sparsify_activations(model, "0.4", tiny_samples("llama"))
    mlp = model.model.layers[0].mlp
    assert mlp.gate_proj.scap_threshold == mlp.up_proj.scap_threshold != mlp.down_proj.scap_threshold


def test_thresholds_are_the_quantiles_of_what_the_sparse_model_sees() -> None:
    model, samples = tiny_model("llama"), tiny_samples("llama")
    sparsify_activations(model, SCAPConfig.from_spec("up=0.3,down=0.6", mode="down=median"), samples)
    seen: list[np.ndarray] = []
    layer = model.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].numpy()))
    for sample in samples:
        logits_of(model, sample)
    values = np.concatenate([value.reshape(-1) for value in seen])
    assert layer.scap_mode == pytest.approx(np.median(values), abs=0.02 * float(values.std()))
    pruned = np.abs(values - np.float32(layer.scap_mode)) <= np.float32(layer.scap_threshold)
    assert pruned.mean() == pytest.approx(0.6, abs=0.01)


def test_padding_does_not_count() -> None:
    plain, padded = tiny_model("llama"), tiny_model("llama")
    samples = [{"input_ids": sample["input_ids"][:1]} for sample in tiny_samples("llama")]
    with_padding = [
        {
            "input_ids": torch.cat([sample["input_ids"], torch.zeros(1, 40, dtype=torch.long)], 1),
            "attention_mask": torch.cat([torch.ones(1, 48), torch.zeros(1, 40)], 1).long(),
        }
        for sample in samples
    ]
    for model, data in ((plain, samples), (padded, with_padding)):
        sparsify_activations(model, "0.5", data)
    thresholds = [[module.scap_threshold for module in pruned_layers(model).values()] for model in (plain, padded)]
    assert thresholds[0] == pytest.approx(thresholds[1], rel=1e-3)


@pytest.mark.parametrize("kind", ["list", "generator", "loader", "nncf", "table", "tuples"])
def test_every_kind_of_dataset(kind: str) -> None:
    samples = tiny_samples("llama")
    data = {
        "list": lambda: samples,
        "generator": lambda: (sample for sample in samples),
        "loader": lambda: DataLoader(torch.cat([sample["input_ids"] for sample in samples]), batch_size=2),
        "nncf": lambda: nncf.Dataset(samples),
        "table": lambda: Dataset.from_dict(
            {"input_ids": [row.tolist() for sample in samples for row in sample["input_ids"]]}
        ),
        "tuples": lambda: [(sample["input_ids"],) for sample in samples],
    }[kind]()
    model, expected = tiny_model("llama"), tiny_model("llama")
    sparsify_activations(model, "0.4", data)
    sparsify_activations(expected, "0.4", samples)
    for path, module in pruned_layers(model).items():
        assert module.scap_threshold == pytest.approx(pruned_layers(expected)[path].scap_threshold, rel=0.02)


def test_arrays_are_samples_too() -> None:
    model, expected, samples = tiny_model("llama"), tiny_model("llama"), tiny_samples("llama")
    sparsify_activations(expected, "0.4", samples)
    sparsify_activations(model, "0.4", nncf.Dataset([{"input_ids": x["input_ids"].cpu().numpy()} for x in samples]))
    for path, module in pruned_layers(model).items():  # an nncf.Dataset has no length: its first pass is a whole one
        assert module.scap_threshold == pytest.approx(pruned_layers(expected)[path].scap_threshold, rel=0.02)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"input_ids": [[1, 9999]]}], r"a LlamaForCausalLM cannot run on the calibration sample \{input_ids: "),
        (["some text"], "pass tokenizer="),
        ([{"ids": torch.ones(1, 8).long()}], r"calibration sample \{ids: Tensor\[1, 8\]\}"),
        ({"input_ids": torch.ones(1, 8).long()}, "a dict of input_ids is one sample"),
        (DatasetDict({"train": Dataset.from_dict({"text": ["a"]})}), "a DatasetDict of train is one sample or a dict"),
        (5, "a dataset of type int cannot be iterated over"),
    ],
)
def test_data_that_no_model_can_read(data: object, message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(SCAPError, match=message):
        sparsify_activations(model, "0.4", data)
    assert not pruned_layers(model)


def test_tables_with_gaps_and_streams_without_columns() -> None:
    class Characters:
        is_fast = False

        def __call__(self, text: str, **_options: object) -> dict[str, list[int]]:
            return {"input_ids": [3 + ord(character) % 100 for character in text]}

    rows = [{"text": None}, {"text": " "}, *({"text": "a quick brown fox jumps over the lazy dog" * 4},) * 4]
    config = SCAPConfig.from_spec("0.4", num_samples=4, seq_len=32)
    found = []
    for table in (Dataset.from_list(rows), IterableDataset.from_generator(lambda: iter(rows))):
        model = tiny_model("llama")
        sparsify_activations(model, config, table, tokenizer=Characters())
        found.append([module.scap_threshold for module in pruned_layers(model).values()])
    assert found[0] == found[1]


@pytest.mark.parametrize("what", ["model", "block"])
def test_models_that_are_compiled_already(what: str) -> None:
    """Compiled code does not see the hooks that are added later."""
    model, expected, samples = tiny_model("llama"), tiny_model("llama"), tiny_samples("llama")
    for module in [model] if what == "model" else [layer.mlp for layer in model.model.layers]:
        module.compile(backend="aot_eager")
    logits_of(model, samples[0])
    for each in (model, expected):
        sparsify_activations(each, "0.4", samples)
    for path, module in pruned_layers(expected).items():
        assert pruned_layers(model)[path].scap_threshold == pytest.approx(module.scap_threshold, rel=1e-5)
    torch.testing.assert_close(logits_of(model, samples[0]), logits_of(expected, samples[0]), atol=1e-4, rtol=1e-4)


def test_layers_that_are_called_with_keywords() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj, self.down_proj = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(input=self.up_proj(input=x).tanh())

    model, samples = Block(), [torch.randn(64, 16)]
    sparsify_activations(model, "0.4", samples)
    assert measure_sparsity(model, samples) == pytest.approx({"up_proj": 0.4, "down_proj": 0.4}, abs=0.01)


def test_layers_that_stay_dense_are_named(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(input)

    model = nn.Sequential()
    model.up_proj, model.down_proj = Scaled(8, 16), nn.Linear(16, 8)
    samples, before = [torch.randn(32, 8)], type(model.up_proj)
    with pytest.raises(SCAPError, match="up_proj: the forward of Scaled is not that of nn.Linear"):
        sparsify_activations(model, "up=0.4", samples)
    sparsify_activations(model, "0.4", samples)
    assert type(model.up_proj) is before and pruned_layers(model).keys() == {"down_proj"}
    assert "1 layers are left dense; up_proj: the forward of Scaled" in caplog.text

    lazy = nn.Sequential()
    lazy.up_proj = nn.LazyLinear(8)
    with pytest.raises(SCAPError, match="run the model once"):
        sparsify_activations(lazy, "0.4", samples)
    with pytest.raises(SCAPError, match="the include and exclude patterns leave none"):
        sparsify_activations(tiny_model("llama"), SCAPConfig.from_spec("0.4", exclude=("mlp",)), tiny_samples("llama"))


def test_other_kinds_of_experts_are_not_left_out_silently(caplog: pytest.LogCaptureFixture) -> None:
    config = tf.GraniteMoeConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    samples = tiny_samples("llama")
    with pytest.raises(SCAPError, match=r"input_linear.*the experts in a GraniteMoeParallelExperts"):
        sparsify_activations(tf.GraniteMoeForCausalLM(config), "0.4", samples)
    model = sparsify_activations(tf.GraniteMoeForCausalLM(config), "q=0.4,up=0.4", samples)
    assert len(pruned_layers(model)) == 1
    assert "are not held as those that can be pruned" in caplog.text


def test_any_module_without_transformers() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Linear(16, 64)
            self.down_proj = nn.Linear(64, 16, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down_proj(torch.nn.functional.silu(self.up_proj(x)))

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).train()
    samples = [torch.randn(8, 32, 16) for _ in range(3)]
    sparsify_activations(model, "up=0.2,down=0.5", samples)
    assert all(module.training for module in model.modules())
    for path, sparsity in measure_sparsity(model, samples).items():
        assert sparsity == pytest.approx(0.5 if "down" in path else 0.2, abs=0.01)
    assert read_parameters(model).layers.keys() == {f"{i}.{n}_proj" for i in (0, 1) for n in ("up", "down")}


@pytest.mark.parametrize("spec", ["0.4", "q=0.4,k=0.4,v=0.4,gate=0.4,up=0.4,down=0.4"])
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_models_that_accelerate_offloads(offload: str, spec: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    expected, model, samples = tiny_model("llama"), tiny_model("llama"), tiny_samples("llama")
    if offload == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    for each in (expected, model):
        sparsify_activations(each, SCAPConfig.from_spec(spec, mode="down=median"), samples)
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    one_token = {"input_ids": samples[0]["input_ids"][:1, :1]}
    torch.testing.assert_close(logits_of(model, one_token), logits_of(expected, one_token), atol=1e-5, rtol=1e-4)
    for path, module in pruned_layers(model).items():
        assert module.scap_threshold == pruned_layers(expected)[path].scap_threshold
    torch.testing.assert_close(logits_of(model, samples[0]), logits_of(expected, samples[0]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spec", ["0.4", "q=0.4,k=0.4,v=0.4,gate=0.4,up=0.4,down=0.4"])
def test_offloaded_while_loading(spec: str, tmp_path: Path) -> None:
    model, samples = tiny_model("llama"), tiny_samples("llama")
    sparsify_activations(model, spec, samples)
    model.save_pretrained(tmp_path / "sparse")
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    again = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "sparse", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert len(pruned_layers(again)) == len(pruned_layers(model))
    one_token = {"input_ids": samples[0]["input_ids"][:1, :1]}
    torch.testing.assert_close(logits_of(again, one_token), logits_of(model, one_token), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits_of(again, samples[0]), logits_of(model, samples[0]), atol=1e-5, rtol=1e-4)


def test_failure_leaves_the_model_as_it_was() -> None:
    model, samples = tiny_model("llama"), tiny_samples("llama")
    before = logits_of(model, samples[0])
    broken = copy.deepcopy(samples)
    model.train()
    broken[-1]["input_ids"][0, 0] = 10**6
    with pytest.raises(
        SCAPError, match=r"cannot run on the calibration sample \{input_ids: Tensor\[2, 48\]\}: index out"
    ):
        sparsify_activations(model, "0.4", broken)
    assert model.training
    model.eval()
    assert not pruned_layers(model)
    assert torch.equal(logits_of(model, samples[0]), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_layer(value: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = value
    with pytest.raises(SCAPError, match=r"layers\.1\.mlp\.down_proj.*NaN or infinite"):
        sparsify_activations(model, "down=0.4", tiny_samples("llama"))


def test_all_zero_activations_name_the_layer() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    with pytest.raises(SCAPError, match=r"layers\.0\.mlp\.down_proj.*all of its input activations are zero"):
        sparsify_activations(model, "down=0.4", tiny_samples("llama"))


def test_refusals() -> None:
    samples = tiny_samples("llama")
    model = tiny_model("llama")
    with pytest.raises(SCAPError, match="no fully connected layer is left"):
        sparsify_activations(model, "qkv=0.4", samples)
    with pytest.raises(SCAPError, match="exclude pattern"):
        sparsify_activations(model, SCAPConfig.from_spec("0.4", exclude=("no_such_layer",)), samples)
    with pytest.raises(SCAPError, match="empty"):
        sparsify_activations(model, "0.4", [])
    with pytest.raises(SCAPError, match="tokenizer"):
        sparsify_activations(model, "0.4", Dataset.from_dict({"text": ["some text"]}))
    with pytest.raises(SCAPError, match="no fully connected layer"):
        sparsify_activations(nn.Conv2d(3, 3, 3), "0.4", [torch.zeros(1, 3, 8, 8)])
    sparsify_activations(model, "0.4", samples)
    with pytest.raises(SCAPError, match="sparse already"):
        sparsify_activations(model, "0.4", samples)


def test_parameters_alone(tmp_path: Path) -> None:
    model, samples = tiny_model("gpt2"), tiny_samples("gpt2")
    sparsify_activations(model, SCAPConfig.from_spec("0.4", mode="median"), samples)
    save_parameters(read_parameters(model), tmp_path / "parameters.json")
    other = tiny_model("gpt2")
    sparsify_activations(other, load_parameters(tmp_path / "parameters.json"))
    assert torch.equal(logits_of(model, samples[0]), logits_of(other, samples[0]))
    with pytest.raises(
        SCAPError, match=r"layer transformer\.h\.0\.\S+ does not exist in the model, a LlamaForCausalLM"
    ):
        sparsify_activations(tiny_model("llama"), load_parameters(tmp_path / "parameters.json"))
    with pytest.raises(SCAPError, match="no dataset is needed"):
        sparsify_activations(tiny_model("gpt2"), load_parameters(tmp_path / "parameters.json"), samples)


def test_parameters_of_wrapped_models(tmp_path: Path) -> None:
    model, samples = nn.DataParallel(tiny_model("llama")), tiny_samples("llama")
    sparsify_activations(model, "0.4", samples)
    save_parameters(read_parameters(model), tmp_path / "parameters.json")
    other = sparsify_activations(tiny_model("llama"), load_parameters(tmp_path / "parameters.json"))
    assert torch.equal(logits_of(other, samples[0]), logits_of(model.module, samples[0]))


def test_a_head_may_be_added_or_left_out(tmp_path: Path) -> None:
    model, samples = tiny_model("llama"), tiny_samples("llama")
    sparsify_activations(model, "0.4", samples)
    model.save_pretrained(tmp_path / "causal")
    base = tf.AutoModel.from_pretrained(tmp_path / "causal")
    assert len(pruned_layers(base)) == 6
    with torch.no_grad():
        hidden = base(**samples[0]).last_hidden_state
        assert torch.equal(hidden, model.model(**samples[0]).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    classifier = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert len(pruned_layers(classifier)) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    # Converting a model in memory converts more (the rotary embedding's table) than loading it in this dtype does.
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    samples = tiny_samples("llama")
    sparsify_activations(model, SCAPConfig.from_spec("0.4", mode="median"), samples)
    for path, sparsity in measure_sparsity(model, samples).items():
        assert sparsity == pytest.approx(0.4, abs=0.01), path
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert torch.equal(logits_of(again, samples[0]), logits_of(model, samples[0]))
    one = {"input_ids": samples[0]["input_ids"][:1, :1]}
    assert torch.equal(logits_of(again, one), logits_of(model, one))
    other = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert other.dtype == torch.float32
    for path, module in pruned_layers(other).items():
        half = pruned_layers(again)[path]
        assert torch.equal(module.weight, half.weight.float()) and module.scap_threshold == half.scap_threshold
    error = logits_of(other, one) - logits_of(again, one).float()
    assert error.norm() < 0.3 * logits_of(other, one).norm()


def test_sharded_checkpoints(tmp_path: Path) -> None:
    model, samples = tiny_model("llama"), tiny_samples("llama")
    sparsify_activations(model, "0.4", samples)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, samples[0]), logits_of(model, samples[0]))
