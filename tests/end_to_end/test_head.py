"""The layer that computes the logits as a role of its own, in both backends."""

from pathlib import Path
from typing import Any

import optimum.intel
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimum_scap import OVModelForCausalLM, SCAPConfig, sparsify_activations
from optimum_scap.openvino.backend import measure_sparsity as measure_openvino
from optimum_scap.openvino.fuse import fuse
from optimum_scap.torch import linear
from optimum_scap.torch.backend import measure_sparsity, pruned_layers, read_parameters


SPEC = "down=0.5,head=0.4"


def llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied, pad_token_id=0)
    return LlamaForCausalLM(config).eval()


def text(count: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(1, 97, (1, 50), generator=generator)} for _ in range(count)]


def test_a_number_leaves_the_head_dense() -> None:
    model = sparsify_activations(llama(tied=False), "0.5", text())
    assert not any("lm_head" in path for path in pruned_layers(model))


@pytest.mark.parametrize("tied", [False, True])
def test_every_token_counts_for_the_head(tied: bool) -> None:
    model = sparsify_activations(llama(tied), SPEC, text())
    parameters = read_parameters(model)
    assert parameters is not None and parameters.layers["lm_head"].role == "head"
    realized = measure_sparsity(model, text())
    assert realized["lm_head"] == pytest.approx(0.4, abs=0.01)
    captured: list[Any] = []
    model.lm_head.register_forward_pre_hook(lambda _module, args: captured.append(args[0]))
    with torch.no_grad():
        for sample in text():
            model(**sample)
    x = torch.cat(captured, dim=1)
    assert x.shape[1] == 300
    pruned = (x.abs() <= parameters.layers["lm_head"].threshold).float().mean()
    assert pruned.item() == pytest.approx(0.4, abs=0.01)


def test_a_tied_head_in_another_order_leaves_the_embedding_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dense = llama(tied=True)
    ids = text(1)[0]["input_ids"]
    parameters = read_parameters(sparsify_activations(llama(tied=True), SPEC, text()))
    assert parameters is not None
    plain = sparsify_activations(llama(tied=True), parameters)
    with torch.no_grad():
        expected = plain(ids).logits
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    # As on a GPU.
    monkeypatch.setattr(linear, "wants_input_major", lambda weight: True)
    model = sparsify_activations(llama(tied=True), parameters)
    assert model.lm_head.weight.stride() == (1, 97) and model.model.embed_tokens.weight.stride() == (32, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.stride() == (1, 97) and loaded.model.embed_tokens.weight.stride() == (32, 1)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, expected)
    torch.testing.assert_close(loaded.model.embed_tokens.weight, dense.model.embed_tokens.weight)


def test_openvino(tmp_path: Path) -> None:
    llama(tied=True).save_pretrained(tmp_path / "dense")
    model = OVModelForCausalLM.from_pretrained(tmp_path / "dense", export=True, compile=False)
    samples = [model.prepare_inputs(sample["input_ids"], torch.ones_like(sample["input_ids"])) for sample in text()]
    sparsify_activations(model, SCAPConfig.from_spec(SPEC), samples)
    assert measure_openvino(model.model, samples)["lm_head"] == pytest.approx(0.4, abs=0.01)
    ids = text(1)[0]["input_ids"][:, :1]
    mask = torch.ones_like(ids)
    model.save_pretrained(tmp_path / "sparse")
    assert "lm_head" in fuse(model.model.clone(), precision="f32").fused
    f32 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    found, expected = (
        cls.from_pretrained(tmp_path / "sparse", ov_config=f32)(input_ids=ids, attention_mask=mask).logits
        for cls in (OVModelForCausalLM, optimum.intel.OVModelForCausalLM)
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
