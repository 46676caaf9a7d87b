"""What a folder of a sparse PyTorch checkpoint says about itself, read without loading the model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from optimum_scap import SCAPError, sparsify_activations
from optimum_scap.torch.checkpoint import kernel_shapes
from optimum_scap.torch.prunable import in_features, is_conv1d


BLOCK = {"vocab_size": 128, "n_embd": 48, "n_layer": 1, "n_head": 4, "n_positions": 64}
# All of them call their layers c_fc, c_proj and c_attn.
NAMED_ALIKE: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**BLOCK)),
    "gpt_bigcode": lambda: tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**BLOCK, n_inner=192)),
    "starcoder2": lambda: tf.Starcoder2ForCausalLM(
        tf.Starcoder2Config(
            vocab_size=128,
            hidden_size=48,
            intermediate_size=192,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ),
    "gpt_neo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(vocab_size=128, hidden_size=48, num_layers=1, attention_types=[[["global"], 1]], num_heads=4)
    ),
}


@pytest.mark.parametrize("name", NAMED_ALIKE)
def test_shapes_are_those_of_the_layers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = NAMED_ALIKE[name]().eval()
    samples = [{"input_ids": torch.randint(3, 128, (2, 32))} for _ in range(2)]
    sparsify_activations(model, "up=0.4,down=0.4", samples)
    model.save_pretrained(tmp_path)
    up, down = (
        next(m for path, m in model.named_modules() if path.endswith(end)) for end in ("mlp.c_fc", "mlp.c_proj")
    )
    assert is_conv1d(up) == (name == "gpt2") and (in_features(up), in_features(down)) == (48, 192)
    assert kernel_shapes(tmp_path) == {torch.float32: {(48, (192,)), (192, (48,))}}


def test_layers_of_a_model_with_another_head(tmp_path: Path) -> None:
    model = NAMED_ALIKE["gpt2"]().eval()
    samples = [{"input_ids": torch.randint(3, 128, (2, 32))} for _ in range(2)]
    sparsify_activations(model, "qkv=0.4,o=0.4", samples)
    model.half().save_pretrained(tmp_path)
    assert kernel_shapes(tmp_path) == {torch.float16: {(48, (144,)), (48, (48,))}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"architectures": ["OfSomeoneElse"]}, None),
        ({"n_layer": 0}, r"layer transformer\.h\.0\.mlp\.c_fc does not exist"),
        ({"n_embd": "x"}, r"config\.json describes no model: "),
    ],
)
def test_configs_that_describe_another_model(damage: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    model = NAMED_ALIKE["gpt2"]().eval()
    samples = [{"input_ids": torch.randint(3, 128, (2, 32))} for _ in range(2)]
    sparsify_activations(model, "up=0.4", samples)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    if message is None:  # its code is not known, and the layers of such models are nn.Linear
        assert kernel_shapes(tmp_path) == {torch.float32: {(192, (48,))}}
    else:
        with pytest.raises(SCAPError, match=message):
            kernel_shapes(tmp_path)
