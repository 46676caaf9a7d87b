"""Calibration inputs for torch models: local files, named datasets, generated text, or what the caller brings."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import SCAPConfig
from ..errors import SCAPError
from ..text import cut_into_windows, is_text_file, load_tokenizer, token_windows


logger = logging.getLogger(__name__)


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
            an `nncf.Dataset`, a DataLoader, or an iterable of model inputs.
        tokenizer: the tokenizer or where to load it from; by default where the model was loaded from.
        trust_remote_code: whether a tokenizer may bring code of its own.

    Raises:
        SCAPError: if the dataset cannot be loaded, or is empty or too short.
    """
    dataset = config.dataset if dataset is None else dataset
    if isinstance(dataset, str | Path):
        name = str(dataset)
        check_dataset_name(name)
        loaded = _load_tokenizer(model, tokenizer, trust_remote_code)
        if is_text_file(name):
            windows = token_windows(name, loaded, config.num_samples, _seq_len(model, config))
            return _for_model(model, _from_windows(windows, config, name))
        if name == "auto":
            return _for_model(model, _generated(model, loaded, config))
        return _for_model(model, _from_name(name, loaded, config, trust_remote_code))
    if hasattr(dataset, "column_names") and not isinstance(dataset, dict):
        return _from_table(model, dataset, config, tokenizer, trust_remote_code)
    if hasattr(dataset, "get_inference_data"):
        return _Again(dataset.get_inference_data)
    if hasattr(dataset, "keys"):
        raise SCAPError(
            f"a {type(dataset).__name__} of {', '.join(map(str, dataset))} is one sample or a dict of splits; pass a "
            "list of samples, or one split"
        )
    if not isinstance(dataset, Iterable):
        raise SCAPError(f"a dataset of type {type(dataset).__name__} cannot be iterated over")
    return list(dataset) if isinstance(dataset, Iterator) else dataset


def check_dataset_name(name: str) -> None:
    """Checks that `name` is `auto`, an existing file, or a name that optimum-intel's dataset helper knows.

    Raises:
        SCAPError: otherwise, listing what can be used.
    """
    if name == "auto":
        return
    if is_text_file(name):
        if not Path(name).is_file():
            raise SCAPError(f"dataset file {name} does not exist or is not a file")
        return
    try:
        from ..openvino.dataset import check_dataset_name as check
    except ImportError as error:
        raise SCAPError(
            f"dataset {name!r} is not a file, and datasets by name need optimum-intel: pip install "
            '"optimum-scap[openvino]", or use auto, a .txt, .jsonl, .json or .parquet file'
        ) from error
    check(name)


class _Again:
    """An iterable that starts anew every time, as nncf.Dataset gives it."""

    def __init__(self, start: Any) -> None:
        self._start = start

    def __iter__(self) -> Iterator[Any]:
        return iter(self._start())


def _from_windows(
    windows: list[dict[str, list[int]]], config: SCAPConfig, source: str
) -> list[dict[str, torch.Tensor]]:
    if len(windows) < config.num_samples:
        logger.warning(
            "%s holds only %d samples of the length asked for, not %d; calibrating on those",
            source,
            len(windows),
            config.num_samples,
        )
    return [{name: torch.tensor([values]) for name, values in window.items()} for window in windows]


def _for_model(model: nn.Module, samples: list[Any]) -> list[Any]:
    """What a decoder behind an encoder needs besides: it reads the same text."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return samples
    return [{**sample, "decoder_input_ids": prepare(labels=sample["input_ids"])} for sample in samples]


def _generated(model: nn.Module, tokenizer: Any, config: SCAPConfig) -> list[Any]:
    try:
        from nncf.data import generate_text_data
    except ImportError as error:
        raise SCAPError(
            "dataset auto (text that the model generates) needs nncf: pip install nncf, or use a .txt, .jsonl, "
            ".json or .parquet file"
        ) from error
    from transformers import GenerationMixin, set_seed

    if not isinstance(model, GenerationMixin):
        raise SCAPError(
            f"dataset auto needs a model that generates text, a {type(model).__name__} does not; pass a dataset of "
            "model inputs or a text file"
        )
    set_seed(config.seed)
    texts = generate_text_data(model, tokenizer, dataset_size=config.num_samples)
    return [dict(tokenizer(text, return_tensors="pt")) for text in texts]


def _from_name(name: str, tokenizer: Any, config: SCAPConfig, trust_remote_code: bool) -> list[Any]:
    """What optimum-intel's helper makes of the name of a dataset, the same as for an OpenVINO model."""
    from ..openvino.dataset import named_text_samples

    return [
        {key: torch.as_tensor(value) for key, value in sample.items() if key in ("input_ids", "attention_mask")}
        for sample in named_text_samples(name, tokenizer, config, trust_remote_code)
    ]


def _from_table(
    model: nn.Module, table: Any, config: SCAPConfig, tokenizer: Any, trust_remote_code: bool
) -> list[Any]:
    """A datasets.Dataset: rows of model inputs, or a column of text that is cut into windows."""
    columns = list(table.column_names or next(iter(table), ()))  # a stream may not know its columns
    inputs = [name for name in columns if name in ("input_ids", "pixel_values", "input_values", "input_features")]
    if inputs:
        kept = [name for name in (*inputs, "attention_mask", "token_type_ids") if name in columns]
        rows = (row for row, _ in zip(table, range(config.num_samples), strict=False))
        return [{name: torch.as_tensor(row[name]).unsqueeze(0) for name in kept} for row in rows]
    texts = [name for name in columns if name == "text"] or [
        name for name in columns if isinstance(next(iter(table), {}).get(name), str)
    ]
    if len(texts) != 1:
        raise SCAPError(
            "the calibration dataset needs model inputs (input_ids, pixel_values, ...) or one column of text; its "
            f"columns are {', '.join(columns) or 'none'}"
        )
    loaded = _load_tokenizer(model, tokenizer, trust_remote_code)
    documents = (row[texts[0]] for row in table)
    windows = cut_into_windows(documents, loaded, config.num_samples, _seq_len(model, config), "the dataset")
    return _for_model(model, _from_windows(windows, config, "the dataset"))


def _seq_len(model: nn.Module, config: SCAPConfig) -> int:
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(config.seq_len, longest) if isinstance(longest, int) and longest > 0 else config.seq_len


def _load_tokenizer(model: nn.Module, source: Any, trust_remote_code: bool) -> Any:
    if source is None:
        source = getattr(getattr(model, "config", None), "_name_or_path", None)
    if isinstance(source, str) and not source:
        source = None
    if source is None:
        raise SCAPError("the dataset is text, and the model does not say where its tokenizer is: pass tokenizer=")
    return load_tokenizer(source, trust_remote_code)
