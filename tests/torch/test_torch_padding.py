"""Padding changes neither thresholds nor the sparsity that is measured, whichever tokens a layer reads."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tiny_models import tiny_model
from torch import nn

from optimum_scap import SCAPConfig, SCAPError, SCAPParameters, sparsify_activations
from optimum_scap.core.parameters import LayerParameters
from optimum_scap.torch.backend import measure_sparsity, pruned_layers
from optimum_scap.torch.collect import ModelRun


EVERYTHING = "q=0.5,k=0.5,v=0.5,o=0.5,up=0.5,down=0.5"


def encoder_decoder(name: str) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    common = {"vocab_size": 99, "d_model": 32, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if name == "t5":
        config: Any = tf.T5Config(**common, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
        return tf.T5ForConditionalGeneration(config).eval()
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
    cls = {"bart": (tf.BartConfig, tf.BartForConditionalGeneration), "marian": (tf.MarianConfig, tf.MarianMTModel)}
    model = cls[name][1](cls[name][0](**common, **layers, **sizes, activation_function="gelu")).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=0.4)
    return model


def right_padded(ids: torch.Tensor, length: int, value: int) -> torch.Tensor:
    return nn.functional.pad(ids, (0, length - ids.shape[1]), value=value)


def thresholds(model: nn.Module, samples: Any, spec: str = EVERYTHING) -> dict[str, float]:
    sparsify_activations(model, spec, samples)
    return {path: module.scap_threshold for path, module in pruned_layers(model).items()}


@pytest.mark.parametrize("decoder", ["mask", "labels", "ids"])
@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_encoder_and_decoder_padded_to_one_length(name: str, decoder: str) -> None:
    generator = torch.Generator().manual_seed(1)
    plain, padded = [], []
    for _ in range(3):
        source, target = (torch.randint(3, 99, (1, tokens), generator=generator) for tokens in (20, 12))
        target[0, 0] = 1
        labels = nn.functional.pad(target[:, 1:], (0, 1), value=2)
        plain.append({"input_ids": source, "decoder_input_ids": target})
        sample = {
            "input_ids": right_padded(source, 24, 1),
            "attention_mask": right_padded(torch.ones_like(source), 24, 0),
            "decoder_input_ids": right_padded(target, 24, 1),
        }
        if decoder == "mask":
            sample["decoder_attention_mask"] = right_padded(torch.ones_like(target), 24, 0)
        elif decoder == "labels":
            sample["labels"] = right_padded(labels, 24, -100)
        padded.append(sample)
    expected = thresholds(encoder_decoder(name), plain)
    assert any("ecoder" in path and "k" in path.split(".")[-1] for path in expected)
    assert thresholds(encoder_decoder(name), padded) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, form) for name in ("llama", "opt") for form in ("dict", "BatchEncoding", "tuple", "lists", "bool")),
        ("llama", "4-D mask"),  # OPT counts positions by the mask
    ],
)
def test_decoders(name: str, form: str, side: str) -> None:
    generator = torch.Generator().manual_seed(1)
    plain, padded = [], []
    for _ in range(3):
        ids, gap = torch.randint(3, 99, (1, 20), generator=generator), torch.ones(1, 12, dtype=torch.long)
        parts = (gap, ids) if side == "left" else (ids, gap)
        mask = torch.cat([torch.zeros_like(part) if part is gap else torch.ones_like(part) for part in parts], 1)
        if form == "4-D mask":
            mask = torch.tril(torch.ones(32, 32, dtype=torch.bool))[None, None] & mask.bool()[:, None, None]
        sample = {"input_ids": torch.cat(parts, 1), "attention_mask": mask.bool() if form == "bool" else mask}
        if form == "4-D mask":
            sample["position_ids"] = (torch.arange(32)[None] - (12 if side == "left" else 0)).clamp(min=0)
        plain.append({"input_ids": ids})
        padded.append(
            {
                "BatchEncoding": lambda sample: tf.BatchEncoding(sample),
                "tuple": lambda sample: tuple(sample.values()),
                "lists": lambda sample: {key: value.tolist() for key, value in sample.items()},
            }.get(form, dict)(sample)
        )
    expected = thresholds(tiny_model(name), plain, "up=0.5,down=0.7")
    found = thresholds(tiny_model(name), padded, "up=0.5,down=0.7")
    assert found == pytest.approx(expected, rel=1e-2 if side == "left" else 1e-3)


class Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(2, 3)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.up_proj(x)


def sparse_model() -> nn.Module:
    layer = LayerParameters(role="up", method="zero", target_sparsity=0.5, mode=0.0, threshold=1.0)
    parameters = SCAPParameters(version="1", config=SCAPConfig.from_spec("up=0.5"), layers={"up_proj": layer})
    return sparsify_activations(Up(), parameters)


def test_measured_sparsity_is_an_average_over_tokens() -> None:
    samples: list[Any] = [{"x": torch.tensor([[[0.0, 2.0]]])}, {"x": torch.zeros(1, 3, 2)}]
    assert measure_sparsity(sparse_model(), samples) == {"up_proj": (0.5 + 3) / 4}
    padded = {"x": np.array([[[2, 2], [0, 0]]], dtype=np.float32), "attention_mask": np.array([[1, 0]])}
    assert measure_sparsity(sparse_model(), [*samples, padded]) == {"up_proj": (0.5 + 3) / 5}
    assert measure_sparsity(sparse_model(), [*samples, tuple(padded.values())]) == {"up_proj": (0.5 + 3) / 5}
    assert measure_sparsity(sparse_model(), iter(samples)) == {"up_proj": (0.5 + 3) / 4}


def test_nothing_to_measure() -> None:
    with pytest.raises(SCAPError, match="dataset to measure sparsity on is empty"):
        measure_sparsity(sparse_model(), [])
    only_padding = {"x": torch.zeros(1, 2, 2), "attention_mask": torch.zeros(1, 2)}
    assert measure_sparsity(sparse_model(), [only_padding]) == {}
    assert measure_sparsity(Up(), []) == {}


def test_a_vision_tower_takes_no_part_in_text() -> None:
    """Five tokens as well as five patches: the mask of the ones is none of the others."""
    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = tf.LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    config = tf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=100, vision_feature_layer=-1, image_seq_length=4
    )
    sample = {
        "input_ids": torch.tensor([[100, 100, 100, 100, 5]]),
        "pixel_values": torch.randn(1, 3, 16, 16),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0]]),
    }
    seen: dict[str, list[int]] = {}
    runner = ModelRun(model := tf.LlavaForConditionalGeneration(config).eval(), {}, {})
    for path, module in model.named_modules():
        if path.endswith("fc1"):
            module.register_forward_pre_hook(
                lambda _, args, path=path: seen.update({path: list(runner.without_padding(path, args[0]).shape)})
            )
    runner.forward(sample)
    assert [shape for path, shape in seen.items() if "vision_tower" in path] == [[1, 5, 16]] * 2
    with pytest.raises(
        SCAPError, match=r"4 layers to prune in model.vision_tower; leave .* '\^model\\.vision_tower\\\.'"
    ):
        sparsify_activations(model, "0.4", [{"input_ids": torch.randint(3, 99, (1, 8))}])
    sparsify_activations(model, SCAPConfig.from_spec("0.4", exclude=(r"^model\.vision_tower\.",)), [sample])
