"""Checkpoints that hold more, less or something else than their config.json says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, tiny_model, tiny_samples

from optimum_scap import SCAPError, sparsify_activations
from optimum_scap.checkpoint import check_checkpoint
from optimum_scap.torch.checkpoint import load_model


SIZES = {"vocab_size": 128, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "num_hidden_layers": 2}
T5 = {"vocab_size": 128, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}
# Beside those of tiny_models: experts, which are fused while they are loaded, encoders with decoders, tied weights.
OTHERS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**SIZES, moe_intermediate_size=32, num_experts=4, head_dim=12)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "base": lambda: tf.LlamaModel(tf.LlamaConfig(**SIZES)),
    "albert": lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(**{**SIZES, "num_key_value_heads": 4}, embedding_size=16)),
    "mamba2": lambda: tf.Mamba2ForCausalLM(
        tf.Mamba2Config(vocab_size=128, hidden_size=32, num_heads=8, head_dim=8, state_size=8, num_hidden_layers=2)
    ),
}
METHOD = {"quant_method": "modelopt"}


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def load_in_earnest(folder: Path) -> Any:
    return load_model(str(folder), "auto", "auto", "cpu", {"trust_remote_code": False})


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("optimum_scap")]


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
@pytest.mark.parametrize("sharded", [False, True])
def test_healthy_checkpoints(name: str, sharded: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = OTHERS[name]() if name in OTHERS else tiny_model(name)
    model.save_pretrained(tmp_path, max_shard_size="40KB" if sharded else "5GB")
    assert (tmp_path / "model.safetensors.index.json").is_file() == sharded
    check_checkpoint(tmp_path)
    assert not said(caplog)  # neither that weights are left out nor that nothing was compared


def test_sparse_checkpoints_are_healthy(tmp_path: Path) -> None:
    sparsify_activations(tiny_model("gpt2"), "0.4", tiny_samples("gpt2")).save_pretrained(tmp_path)
    check_checkpoint(tmp_path)


def scale_of_a_layer(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(1)


def bias_of_a_layer(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.self_attn.q_proj.bias"] = torch.ones(48)


def another_block(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.2.mlp.up_proj.weight"] = torch.ones(96, 48)


def part_of_a_block(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.shared_expert.up_proj.weight"] = torch.ones(96, 48)


def scale_of_the_head(weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight_scale"] = torch.ones(1)


def without_its_prefix(weights: dict[str, torch.Tensor]) -> None:
    for name in list(weights):
        weights[name.removeprefix("model.")] = weights.pop(name)
    weights["layers.0.mlp.up_proj.weight_scale"] = torch.ones(1)


@pytest.mark.parametrize(
    "change",
    [scale_of_a_layer, bias_of_a_layer, another_block, part_of_a_block, scale_of_the_head, without_its_prefix],
)
def test_weights_that_the_model_has_no_place_for(change: Callable[..., None], llama: Path) -> None:
    change_weights(llama, change)
    for load in (check_checkpoint, load_in_earnest):
        with pytest.raises(SCAPError, match=r"1 weights have no place in the LlamaForCausalLM .*such as .*\."):
            load(llama)


def test_a_config_that_names_fewer_layers(llama: Path) -> None:
    change_config(llama, num_hidden_layers=1)
    for load in (check_checkpoint, load_in_earnest):
        with pytest.raises(SCAPError, match=r"9 weights have no place .* such as model\.layers\.1\..*fewer layers"):
            load(llama)
    change_config(llama, num_nextn_predict_layers=1)  # for speculation, which transformers does not run
    check_checkpoint(llama)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight", "model.norm.weight"]
    + ["model.embed_tokens.weight"],
)
def test_weights_that_are_missing(name: str, llama: Path) -> None:
    change_weights(llama, lambda weights: weights.pop(name))
    for load in (check_checkpoint, load_in_earnest):
        with pytest.raises(SCAPError, match=f"cannot be loaded: 1 weights are missing, such as {name}"):
            load(llama)


def test_experts_that_are_missing_or_too_many(tmp_path: Path) -> None:
    OTHERS["mixtral"]().save_pretrained(tmp_path)
    change_config(tmp_path, num_local_experts=2)
    with pytest.raises(SCAPError, match=r"experts\.\S+ has the shape \[4, .*config.json says \[2, "):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ["score.weight"],
        ["classifier.out_proj.weight", "classifier.0.bias"],
        ["vision_tower.layers.0.mlp.fc1.weight"],
        ["model.pooler.dense.weight"],
    ],
)
def test_heads_of_another_task_are_named(names: list[str], llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_weights(llama, lambda weights: weights.update({name: torch.ones(3, 48) for name in names}))
    for load in (check_checkpoint, load_in_earnest):
        caplog.clear()
        load(llama)
        assert f"{len(names)} weights are left out, such as {min(names)}" in caplog.text


def test_a_head_that_is_not_there_yet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    OTHERS["base"]().save_pretrained(tmp_path)
    for architecture, head in (("LlamaForCausalLM", "lm_head"), ("LlamaForSequenceClassification", "score")):
        change_config(tmp_path, architectures=[architecture])
        caplog.clear()
        check_checkpoint(tmp_path)
        assert said(caplog) == [f"{tmp_path}: 1 weights are missing and random, such as {head}.weight"]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.cos_cached"]),
        ("gpt2", ["transformer.h.0.attn.bias", "h.1.attn.masked_bias"]),
        ("bert", ["bert.embeddings.position_ids"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias"]),
    ],
)
def test_tables_of_older_versions_are_harmless(
    name: str, weights: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda held: held.update({name: torch.ones(4) for name in weights}))
    check_checkpoint(tmp_path)
    load_in_earnest(tmp_path)
    assert not said(caplog)


def test_tied_weights_under_either_name(tmp_path: Path) -> None:
    OTHERS["tied"]().save_pretrained(tmp_path)
    change_weights(
        tmp_path, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] + 0})
    )
    check_checkpoint(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop("model.embed_tokens.weight"))
    check_checkpoint(tmp_path)
    load_in_earnest(tmp_path)


def test_quantization_methods(llama: Path) -> None:
    change_config(llama, quantization_config=METHOD)
    for load in (check_checkpoint, load_in_earnest):
        with pytest.raises(SCAPError, match=rf"{llama}.*config\.json names the quant_method 'modelopt', which transf"):
            load(llama)
    change_config(llama, quantization_config={"bits": 4})
    with pytest.raises(SCAPError, match="config.json names no quant_method"):
        check_checkpoint(llama)
    change_config(llama, quantization_config={"quant_method": ["scap"]})
    with pytest.raises(SCAPError, match=r"config\.json names the quant_method \['scap'\]"):
        check_checkpoint(llama)
    for known in ({"quant_method": "fp8"}, {"load_in_8bit": True}):
        change_config(llama, quantization_config=known)
        change_weights(llama, scale_of_a_layer)
        check_checkpoint(llama)


@pytest.mark.parametrize("damage", ["header", "index", "shard", "another shard", "config"])
def test_damaged_files(damage: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    if damage == "header":
        shard.write_bytes(shard.read_bytes()[:40])
    elif damage == "index":
        index.write_text("[]")
    elif damage == "shard":
        shard.unlink()
    elif damage == "another shard":
        shard.write_bytes(sorted(tmp_path.glob("model-*.safetensors"))[2].read_bytes())
    else:
        (tmp_path / "config.json").write_text('{"architectures"')
    named = {"index": "index.json", "config": "config.json"}.get(damage, shard.name)
    with pytest.raises(SCAPError, match=named) as found:
        check_checkpoint(tmp_path)
    assert "\n" not in str(found.value)


def test_what_is_not_checked(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    change_weights(llama, another_block)
    with pytest.raises(SCAPError):
        check_checkpoint(llama)
    check_checkpoint("meta-llama/Llama-2-7b-hf")
    check_checkpoint(tmp_path_factory.mktemp("empty"))
    change_config(llama, auto_map={"AutoModelForCausalLM": "modeling.Model"})  # code of its own
    check_checkpoint(llama)
    for architectures in (["OfSomeoneElse"], None, [], [3], 1.5):
        change_config(llama, auto_map=None, architectures=architectures)
        check_checkpoint(llama)
    (llama / "model.safetensors").rename(llama / "model.gguf")
    check_checkpoint(llama)


def test_the_check_says_nothing_else(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level = tf.utils.logging.get_verbosity()
    change_weights(llama, another_block)
    with pytest.raises(SCAPError):
        check_checkpoint(llama)
    assert capfd.readouterr() == ("", "")
    assert tf.utils.logging.get_verbosity() == level and tf.utils.logging.is_progress_bar_enabled()


def test_tables_that_the_model_makes_by_itself_are_harmless(tmp_path: Path) -> None:
    """Older checkpoints of Swin 2 and CodeGen hold buffers that newer versions of transformers do not store."""
    swin = tf.Swinv2Model(
        tf.Swinv2Config(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    )
    codegen = tf.CodeGenForCausalLM(
        tf.CodeGenConfig(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    )
    for model, name in (
        (swin, "encoder.layers.0.blocks.0.attention.self.relative_coords_table"),
        (codegen, "transformer.h.0.attn.causal_mask"),
    ):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, name: torch.ones(2, 2)}, folder / "model.safetensors", {"format": "pt"})
        check_checkpoint(folder)
        save_file({**weights, f"{name}_scale": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(SCAPError, match="have no place"):
            check_checkpoint(folder)
