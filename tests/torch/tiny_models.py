"""Models with random weights, one per architecture, small enough to be calibrated in a second.

The weights are drawn wide, so that activations differ from token to token as those of a trained model do.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn


HIDDEN, HEADS, LAYERS, FFN, VOCAB = 48, 4, 2, 96, 128

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}


def _vit() -> tf.PretrainedConfig:
    return tf.ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        image_size=32,
        patch_size=8,
        num_labels=3,
    )


# name -> (transformers class, config, fully connected layers of the roles up, gate and down per block)
CONFIGS: dict[str, tuple[str, Callable[[], tf.PretrainedConfig], int]] = {
    "llama": ("LlamaForCausalLM", lambda: tf.LlamaConfig(**_GROUPED), 3),
    "mistral": ("MistralForCausalLM", lambda: tf.MistralConfig(**_GROUPED), 3),
    "qwen2": ("Qwen2ForCausalLM", lambda: tf.Qwen2Config(**_GROUPED), 3),
    "qwen3": ("Qwen3ForCausalLM", lambda: tf.Qwen3Config(**_GROUPED, head_dim=12), 3),
    "gemma": ("GemmaForCausalLM", lambda: tf.GemmaConfig(**_GROUPED, head_dim=12), 3),
    "gemma2": ("Gemma2ForCausalLM", lambda: tf.Gemma2Config(**_GROUPED, head_dim=12), 3),
    "gemma3": ("Gemma3ForCausalLM", lambda: tf.Gemma3TextConfig(**_GROUPED, head_dim=12), 3),
    "phi": ("PhiForCausalLM", lambda: tf.PhiConfig(**_DECODER), 2),
    "phi3": ("Phi3ForCausalLM", lambda: tf.Phi3Config(**_GROUPED), 2),
    "mpt": (
        "MptForCausalLM",
        lambda: tf.MptConfig(d_model=HIDDEN, n_heads=HEADS, n_layers=LAYERS, expansion_ratio=2, vocab_size=VOCAB),
        2,
    ),
    "falcon": (
        "FalconForCausalLM",
        lambda: tf.FalconConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, bos_token_id=1
        ),
        2,
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", lambda: tf.GPTNeoXConfig(**_DECODER), 2),
    "opt": (
        "OPTForCausalLM",
        lambda: tf.OPTConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            ffn_dim=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=256,
            word_embed_proj_dim=HIDDEN,
        ),
        2,
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        lambda: tf.GPT2Config(
            vocab_size=VOCAB,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=256,
            bos_token_id=1,
            eos_token_id=2,
        ),
        2,
    ),
    "bloom": (
        "BloomForCausalLM",
        lambda: tf.BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS),
        2,
    ),
    "bert": ("BertForSequenceClassification", lambda: tf.BertConfig(**_DECODER), 2),
    "vit": ("ViTForImageClassification", _vit, 2),
}


def tiny_model(name: str, seed: int = 0) -> tf.PreTrainedModel:
    """The model called `name` with random float32 weights, in evaluation mode."""
    class_name, config, _ = CONFIGS[name]
    torch.manual_seed(seed)
    return randomize(getattr(tf, class_name)(config()).eval())


@torch.no_grad()
def randomize(model: nn.Module) -> Any:
    """`model` with weights drawn anew, wide, by the generator of torch."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_()
            continue
        for value in module.parameters(recurse=False):
            if value.dim() == 3 and not isinstance(module, nn.Conv1d):  # experts
                value.normal_(std=2.0 / max(value.shape[1:]) ** 0.5)
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 2:
            module.weight.normal_(std=2.0 / max(module.weight.shape) ** 0.5)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.normal_(std=0.1)
    return model


def tiny_samples(name: str, count: int = 4, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Inputs for the model called `name`."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        values = [torch.randn(2, 3, 32, 32, generator=generator, device="cpu") for _ in range(count)]
    else:
        values = [torch.randint(3, VOCAB, (2, 48), generator=generator, device="cpu") for _ in range(count)]
    key = "pixel_values" if name == "vit" else "input_ids"
    return [{key: value.to(torch.get_default_device())} for value in values]


def word_tokenizer(words: int) -> tf.PreTrainedTokenizerFast:
    """A tokenizer of the words w0, w1, ..., `words` tokens in all."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{index}": 3 + index for index in range(words - 3)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
