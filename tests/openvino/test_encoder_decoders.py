"""Datasets for models that optimum-intel splits into an encoder and a decoder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset
from optimum.intel import OVModelForSeq2SeqLM
from tiny_tokenizer import tiny_tokenizer, words

from optimum_scap import SCAPConfig, SCAPError, sparsify_activations
from optimum_scap.openvino.backend import read_parameters
from optimum_scap.openvino.dataset import build_samples


pytestmark = pytest.mark.slow
CONFIG = SCAPConfig.from_spec("0.4", num_samples=3, seq_len=16)
IDS = np.arange(3, 15)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sides = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
    config = tf.BartConfig(
        vocab_size=128,
        d_model=16,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()},
        max_position_embeddings=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("bart")
    tf.BartForConditionalGeneration(config).save_pretrained(folder / "torch")
    tiny_tokenizer().save_pretrained(folder / "torch")
    OVModelForSeq2SeqLM.from_pretrained(folder / "torch", export=True, compile=False).save_pretrained(folder / "ir")
    tiny_tokenizer().save_pretrained(folder / "ir")
    (folder / "a.txt").write_text(words(0, 300))
    return folder


DATASETS: dict[str, tuple[Any, int, int]] = {
    "file": (lambda folder: str(folder / "a.txt"), 3, 16),
    "strings": (lambda folder: [words(0, 300)], 3, 16),
    "column of text": (lambda folder: Dataset.from_dict({"body": [words(0, 300)]}), 3, 16),
    "table of ids": (lambda folder: Dataset.from_dict({"input_ids": [IDS[0].tolist()] * 5}), 3, 12),
    "samples": (lambda folder: [tf.BatchEncoding({"input_ids": IDS})] * 5, 5, 12),
    "batches": (lambda folder: [{"input_ids": np.repeat(IDS, 2, 0), "attention_mask": np.ones((2, 12))}], 2, 12),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_both_parts_get_samples(kind: str, folder: Path) -> None:
    make, count, length = DATASETS[kind]
    model = OVModelForSeq2SeqLM.from_pretrained(folder / "ir", compile=False)
    samples = build_samples(model, CONFIG, make(folder))
    assert len(samples["encoder"]) == count and len(samples["decoder"]) > count
    assert {np.shape(sample["input_ids"]) for sample in samples["encoder"]} == {(1, length)}
    assert all("encoder_attention_mask" in sample for sample in samples["decoder"])


def test_no_part_reads_more_than_it_takes(folder: Path) -> None:
    model = OVModelForSeq2SeqLM.from_pretrained(folder / "ir", compile=False)
    config = CONFIG.model_copy(update={"seq_len": 256})
    sparsify_activations(model, config, str(folder / "a.txt"))
    assert all(read_parameters(part) is not None for part in model.ov_models.values())
    samples = build_samples(model, config, str(folder / "a.txt"))
    assert {np.shape(sample["input_ids"]) for sample in samples["encoder"]} == {(1, 40)}
    assert len(samples["decoder"]) == 3 * 40


def test_refusals(folder: Path) -> None:
    model = OVModelForSeq2SeqLM.from_pretrained(folder / "ir", compile=False)
    for data, message in (
        (
            {"train": [{"input_ids": IDS}]},
            r"of which train names none: pass a dict of samples by model \(encoder, deco",
        ),
        ({"encoder": ["some text"]}, "the dataset for encoder is text: pass model inputs"),
        ([{"labels": IDS}], r"calibration sample \{labels: ndarray\[1, 12\]\} has no input_ids"),
        ([], "made of several models"),
        ("auto", "auto needs a model that is a decoder alone, a OVModelForSeq2SeqLM is made of several"),
        ({"encoder": []}, "the calibration dataset is empty"),
    ):
        with pytest.raises(SCAPError, match=message):
            build_samples(model, CONFIG, data)
    only = build_samples(model, CONFIG, {"encoder": [{"input_ids": IDS, "attention_mask": np.ones((1, 12))}]})
    assert only.keys() == {"encoder"}
