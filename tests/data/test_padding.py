"""Whose tokens a layer reads, and which of them are padding: the rule of both backends, by names and shapes alone."""

from typing import Any

import numpy as np
import pytest

from optimum_scap.data.padding import Padding


MASK = [[1, 1, 1, 0], [1, 1, 0, 0]]
KEPT = [0, 1, 2, 4, 5]
IDS = np.ones((2, 4), dtype=np.int64)
OPT = "model.decoder.layers.0.fc1"
LLAMA = "model.layers.0.mlp.up_proj"


def kept(inputs: dict[str, Any], path: str, *shape: int, **options: Any) -> list[int] | None:
    rows = Padding(inputs, **options).kept_rows(path, shape)
    return None if rows is None else rows.tolist()


@pytest.mark.parametrize("path", [LLAMA, OPT, "__module.model.decoder.layers.0.fc1/aten::linear/MatMul", "up_proj"])
@pytest.mark.parametrize("shape", [(2, 4, 8), (8, 8), (1, 8, 8), (2, 1, 4, 8)])
def test_tokens_in_rows_or_flat(path: str, shape: tuple[int, ...]) -> None:
    assert kept({"input_ids": IDS, "attention_mask": np.array(MASK)}, path, *shape) == KEPT


def test_tokens_before_the_batch() -> None:
    """XLNet and FSMT."""
    assert kept({"attention_mask": np.array(MASK)}, "transformer.layer.0.ff.layer_1", 4, 2, 8) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(2, 5, 8), (7, 8), (8,), (3, 4, 8), (2, 8)])
def test_activations_that_are_not_the_tokens_of_the_mask(shape: tuple[int, ...]) -> None:
    assert kept({"attention_mask": np.array(MASK)}, LLAMA, *shape) is None


def masks() -> dict[str, Any]:
    import torch

    keys = np.array(MASK, dtype=bool)
    scores = np.where(keys, 0.0, -np.inf)[:, None, None]
    causal = np.tril(np.ones((4, 4), dtype=bool))[None, None] & keys[:, None, None]
    return {
        "int": np.array(MASK),
        "bool": keys,
        "float": keys.astype(np.float32),
        "lists": MASK,
        "bool lists": keys.tolist(),
        "torch": torch.tensor(MASK),
        "torch bool": torch.tensor(MASK).bool(),
        "torch bfloat16": torch.tensor(MASK).bfloat16(),
        "[batch, 1, 1, tokens]": keys[:, None, None],
        "[batch, 1, 1, tokens] added": scores.astype(np.float16),
        "[batch, 1, tokens, tokens]": causal,
        "[batch, 1, tokens, tokens] added": np.where(causal, 0.0, np.finfo(np.float32).min).astype(np.float32),
        "[batch, tokens, tokens]": causal[:, 0],
    }


@pytest.mark.parametrize("kind", masks())
def test_masks_of_every_kind(kind: str) -> None:
    assert kept({"input_ids": IDS, "attention_mask": masks()[kind]}, LLAMA, 2, 4, 8) == KEPT


@pytest.mark.parametrize(
    "mask",
    [None, np.ones((2, 4)), np.zeros((2, 1, 4, 4)), {"full_attention": np.array(MASK)}, np.array(["a", "b"])],
)
def test_no_mask_and_masks_without_padding(mask: Any) -> None:
    assert kept({"input_ids": IDS, "attention_mask": mask}, LLAMA, 2, 4, 8) is None


def test_one_mask_for_a_batch() -> None:
    assert kept({"input_ids": IDS, "attention_mask": [[0, 1, 1, 1]]}, LLAMA, 2, 4, 8) == [1, 2, 3, 5, 6, 7]


def test_one_sequence_without_a_batch() -> None:
    assert kept({"input_ids": np.ones(4), "attention_mask": np.array([0, 1, 1, 1])}, LLAMA, 4, 8) == [1, 2, 3]


def test_left_padding_and_wholly_padded_rows() -> None:
    assert kept({"attention_mask": [[0, 0, 1, 1], [0, 0, 0, 0]]}, LLAMA, 2, 4, 8) == [2, 3]


@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds", "position_ids"])
def test_a_mask_that_covers_cached_tokens_too(name: str) -> None:
    mask = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 0, 1]])
    tokens = np.ones((2, 2, 8) if name == "inputs_embeds" else (2, 2))
    assert kept({name: tokens, "attention_mask": mask}, LLAMA, 2, 2, 8) == [0, 1, 3]
    # left padding is all in the cache
    assert kept({name: tokens[:, :1], "attention_mask": mask}, LLAMA, 2, 1, 8) is None


SOURCE, TARGET = [[1, 1, 1, 0]], [[1, 1, 0, 0]]
ENCODER = {
    "T5": ("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.1.EncDecAttention.k"),
    "BART": ("model.encoder.layers.0.fc1", "model.decoder.layers.0.encoder_attn.v_proj"),
    "BERT": ("encoder.encoder.layer.0.intermediate.dense", "decoder.bert.encoder.layer.0.crossattention.self.value"),
}
DECODER = {
    "T5": ("decoder.block.0.layer.1.EncDecAttention.q", "decoder.block.0.layer.2.DenseReluDense.wi"),
    "BART": ("model.decoder.layers.0.encoder_attn.q_proj", "model.decoder.layers.0.self_attn.k_proj"),
    "BERT": ("decoder.bert.encoder.layer.0.crossattention.self.query", "decoder.bert.encoder.layer.0.output.dense"),
}


@pytest.mark.parametrize("family", ENCODER)
def test_encoder_and_decoder_tokens_of_one_length(family: str) -> None:
    ids = np.array([[5, 6, 7, 0]])
    base = {"input_ids": ids, "attention_mask": SOURCE}
    for inputs, expected in (
        ({"decoder_input_ids": ids, "decoder_attention_mask": TARGET}, [0, 1]),
        ({"labels": np.array([[5, 1, -100, -100]])}, [0, 1]),
        ({"decoder_input_ids": np.array([[0, 5, 0, 0]]), "labels": np.array([[5, 1, -100, -100]])}, [0, 1]),
        # it starts with the token that pads
        ({"decoder_input_ids": np.array([[0, 5, 0, 0]])}, [0, 1]),
        ({"decoder_input_ids": np.array([[0, 5, 6, 1]])}, None),
        # made of the encoder's ids, moved by one
        ({}, None),
    ):
        for path in ENCODER[family]:
            assert kept({**base, **inputs}, path, 1, 4, 8, encoder_decoder=True, pad_token=0) == [0, 1, 2]
        for path in DECODER[family]:
            assert kept({**base, **inputs}, path, 1, 4, 8, encoder_decoder=True, pad_token=0) == expected
    longer = {"input_ids": np.ones((1, 4)), "attention_mask": [[1, 1, 0, 0]]}
    assert kept(longer, DECODER[family][0], 1, 4, 8, encoder_decoder=True) == [0, 1, 2]


@pytest.mark.parametrize("family", ENCODER)
def test_encoder_and_decoder_as_models_of_their_own(family: str) -> None:
    """optimum-intel's IRs: the sample tells which one it is for."""
    encoder = {"input_ids": np.ones((1, 4)), "attention_mask": SOURCE}
    decoder = {
        "input_ids": np.ones((1, 2)),
        "attention_mask": [[0, 1, 0, 1]],
        "encoder_hidden_states": np.ones((1, 4, 8)),
        "encoder_attention_mask": SOURCE,
    }
    assert kept(encoder, ENCODER[family][0], 1, 4, 8) == [0, 1, 2]
    assert kept(decoder, ENCODER[family][1], 1, 4, 8) == [0, 1, 2]
    for path in DECODER[family]:
        assert kept(decoder, path, 1, 2, 8) == [1]
    # Its decoder's config says encoder-decoder as well.
    assert kept(decoder, "layers.0.encoder_attn.k_proj", 1, 4, 8, encoder_decoder=True) == [0, 1, 2]
    assert kept(decoder, "layers.0.fc1", 1, 2, 8, encoder_decoder=True) == [1]


def test_labels_of_a_decoder_alone_are_no_padding() -> None:
    """Prompts are ignored in the loss, and read all the same."""
    assert kept({"input_ids": IDS, "labels": np.full((2, 4), -100)}, LLAMA, 2, 4, 8, encoder_decoder=False) is None
    classes = {"input_ids": IDS, "attention_mask": MASK, "labels": np.array([0, 1])}
    assert kept(classes, "model.decoder.layers.0.fc1", 2, 4, 8, encoder_decoder=True) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "path",
    [
        "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1",
        "model.visual.blocks.0.mlp.up_proj",
        "audio_tower.layers.0.fc1",
        "model.multi_modal_projector.fc1",
        "language_model.model.layers.3.cross_attn.k_proj",
    ],
)
def test_a_text_mask_says_nothing_about_images(path: str) -> None:
    """Even where there are as many patches as tokens."""
    sample = {"input_ids": IDS, "attention_mask": np.array(MASK), "pixel_values": np.ones((2, 3, 8, 8))}
    assert kept(sample, path, 2, 4, 8) is None
    assert kept(sample, "model.language_model.layers.0.mlp.up_proj", 2, 4, 8) == KEPT


def test_a_mask_of_frames_is_about_the_frames() -> None:
    sample = {"input_features": np.ones((2, 4, 8)), "attention_mask": MASK}
    assert kept(sample, "speech_encoder.encoder.layers.0.ffn1.intermediate_dense", 2, 4, 8) == KEPT
    # Whisper's encoder reads half as many, and hears the silence in use as well
    assert kept(sample, "model.encoder.layers.0.fc1", 2, 2, 8, encoder_decoder=True) is None
