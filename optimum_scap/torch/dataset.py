"""Calibration inputs for torch models: local files, named datasets, generated text, or what the caller brings."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.config import SCAPConfig
from ..data.lengths import clamp_length
from ..data.named import TEXT_DATASETS, named_windows, split_name
from ..data.samples import texts_or_samples
from ..data.text import check_dataset_name as check_name
from ..data.text import (
    cut_into_windows,
    generated_samples,
    is_text_file,
    load_tokenizer,
    token_windows,
)
from .collect import input_names


def check_dataset_name(name: str) -> None:
    """Checks that `name` is `auto`, an existing file, or a text data set that optimum knows by name.

    Raises:
        SCAPError: otherwise.
    """
    check_name(name, TEXT_DATASETS)


def build_samples(
    model: nn.Module,
    config: SCAPConfig,
    dataset: Any = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Iterable[Any]:
    """Calibration inputs that can be iterated several times.

    Args:
        model: the model they are for.
        config: number, length and seed of the samples, and the dataset where `dataset` is None.
        dataset: None, the name of a dataset, a local file, `auto`, a `datasets.Dataset` (of text, or of model inputs),
            an `nncf.Dataset`, a DataLoader, or an iterable of model inputs or of strings.
        tokenizer: the tokenizer or where to load it from; by default where the model was loaded from.
        trust_remote_code: whether a tokenizer may bring code of its own.

    Raises:
        SCAPError: if the dataset cannot be loaded, or is empty or too short.
    """
    dataset = config.dataset if dataset is None else dataset
    model_config = getattr(model, "config", None)
    if isinstance(dataset, str | Path):
        name = str(dataset)
        check_dataset_name(name)
        loaded = _load_tokenizer(model, tokenizer, trust_remote_code)
        if is_text_file(name):
            seq_len = clamp_length(config.seq_len, model_config, loaded)
            return _for_model(model, _batches(token_windows(name, loaded, config.num_samples, seq_len)))
        if name == "auto":
            return _for_model(model, _batches(generated_samples(model, loaded, config)))
        dataset_name, given = split_name(name)
        seq_len = clamp_length(given or config.seq_len, model_config, loaded)
        return _for_model(model, named_windows(dataset_name, loaded, config.num_samples, seq_len, config.seed))
    documents, samples = texts_or_samples(dataset, config.num_samples, _columns(model))
    if documents is not None:
        loaded = _load_tokenizer(model, tokenizer, trust_remote_code)
        seq_len = clamp_length(config.seq_len, model_config, loaded)
        windows = cut_into_windows(documents, loaded, config.num_samples, seq_len, "the calibration dataset")
        return _for_model(model, _batches(windows))
    return _for_model(model, samples) if hasattr(dataset, "column_names") else samples


def _batches(samples: list[dict[str, list[int]]]) -> list[dict[str, torch.Tensor]]:
    return [{name: torch.tensor([values]) for name, values in sample.items()} for sample in samples]


def _for_model(model: nn.Module, samples: Iterable[Any]) -> list[Any]:
    """What a decoder behind an encoder needs besides: it reads the same text."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None or not _is_encoder_decoder(model):
        return list(samples)
    return [
        {**sample, "decoder_input_ids": prepare(labels=torch.as_tensor(sample["input_ids"]))}
        if "input_ids" in sample and sample.keys().isdisjoint(("decoder_input_ids", "labels"))
        else sample
        for sample in samples
    ]


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _columns(model: nn.Module) -> list[str]:
    """The columns of a table that `model` reads; labels only where a decoder behind an encoder reads them."""
    return [name for name in input_names(model) if name != "labels" or _is_encoder_decoder(model)]


def _load_tokenizer(model: nn.Module, source: Any, trust_remote_code: bool) -> Any:
    if source is None:
        source = getattr(getattr(model, "config", None), "_name_or_path", None)
    return load_tokenizer(source, trust_remote_code)
