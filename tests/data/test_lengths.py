"""How many tokens a model takes: its configuration against what its position table really holds."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf

from optimum_scap.data.lengths import clamp_length, longest_sequence


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
# name -> (model, config, the longest input)
MODELS: dict[str, tuple[str, Any, int]] = {
    "bert": ("BertModel", lambda: tf.BertConfig(**SMALL, vocab_size=99, max_position_embeddings=20), 20),
    "roberta": ("RobertaModel", lambda: tf.RobertaConfig(**SMALL, vocab_size=99, max_position_embeddings=22), 20),
    "xlm-roberta": (
        "XLMRobertaModel",
        lambda: tf.XLMRobertaConfig(**SMALL, vocab_size=99, max_position_embeddings=25, pad_token_id=4),
        20,
    ),
    "mpnet": ("MPNetModel", lambda: tf.MPNetConfig(**SMALL, vocab_size=99, max_position_embeddings=22), 20),
    "opt": (
        "OPTModel",
        lambda: tf.OPTConfig(
            vocab_size=99,
            hidden_size=16,
            ffn_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=20,
            word_embed_proj_dim=16,
        ),
        20,
    ),
    "gpt2": ("GPT2Model", lambda: tf.GPT2Config(vocab_size=99, n_embd=16, n_layer=1, n_head=2, n_positions=20), 20),
    "mpt": (
        "MptModel",
        lambda: tf.MptConfig(vocab_size=99, d_model=16, n_layers=1, n_heads=2, expansion_ratio=1, max_seq_len=20),
        20,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_longest_input_runs_and_no_longer_one(name: str) -> None:
    class_name, config, expected = MODELS[name]
    model = getattr(tf, class_name)(config()).eval()
    assert longest_sequence(model.config) == expected
    for tokens, runs in ((expected, True), (expected + 1, False)):
        ids = torch.full((1, tokens), 7)
        try:
            with torch.no_grad():
                model(ids)
            ran = True
        except (IndexError, RuntimeError):
            ran = False
        assert ran == runs, tokens


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (lambda: tf.T5Config(), None),
        (lambda: tf.T5Config(n_positions=512), None),
        (lambda: tf.BloomConfig(), None),
        (lambda: tf.WhisperConfig(max_target_positions=448), 448),
        (lambda: tf.MistralConfig(max_position_embeddings=4096, sliding_window=64), 4096),
        (lambda: tf.LEDConfig(max_encoder_position_embeddings=64, max_decoder_position_embeddings=32), 32),
        (lambda: tf.CLIPConfig(text_config={"max_position_embeddings": 77}), 77),
        (lambda: tf.LlavaConfig(text_config=tf.LlamaConfig(max_position_embeddings=99)), 99),
        (
            lambda: tf.EncoderDecoderConfig.from_encoder_decoder_configs(
                tf.BertConfig(max_position_embeddings=64), tf.RobertaConfig(max_position_embeddings=40)
            ),
            38,
        ),
        (lambda: None, None),
        (lambda: SimpleNamespace(max_position_embeddings=-1), None),
        (lambda: SimpleNamespace(max_position_embeddings=True, max_seq_len="8"), None),
        (lambda: {"max_position_embeddings": 8}, None),
    ],
)
def test_other_configurations(config: Any, expected: int | None) -> None:
    assert longest_sequence(config()) == expected


def test_tokenizers_may_know_of_a_limit() -> None:
    assert longest_sequence(None, SimpleNamespace(model_max_length=512)) == 512
    assert longest_sequence(tf.BertConfig(max_position_embeddings=20), SimpleNamespace(model_max_length=512)) == 20
    assert longest_sequence(None, SimpleNamespace(model_max_length=int(1e30))) is None
    assert clamp_length(256, tf.RobertaConfig(max_position_embeddings=130)) == 128
    assert clamp_length(64, tf.RobertaConfig(max_position_embeddings=130)) == 64
    assert clamp_length(256, None) == 256
