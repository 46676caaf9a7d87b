"""Calibration inputs for optimum-intel models: named datasets, generated text and local files through one function."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from optimum.intel import OVModelForCausalLM, OVModelForSeq2SeqLM
from optimum.intel.openvino import utils as ov_utils
from optimum.intel.openvino.configuration import OVQuantizationConfigBase
from optimum.intel.openvino.modeling_base import OVBaseModel
from optimum.intel.openvino.quantization import OVCalibrationDatasetBuilder
from transformers import PreTrainedTokenizerBase, set_seed

from ..core.config import SCAPConfig
from ..data.lengths import clamp_length
from ..data.named import with_length
from ..data.samples import as_array, describe_sample, inputs_of, texts_or_samples
from ..data.text import check_dataset_name as check_name
from ..data.text import (
    cut_into_windows,
    generated_samples,
    is_text_file,
    load_tokenizer,
    token_windows,
)
from ..errors import SCAPError, first_line, printable, raise_interruption_behind


# Tokens that the decoder of an encoder-decoder writes per sample.
_GENERATED_TOKENS = 128
_TEXT_INPUTS = ("input_ids", "attention_mask")

KNOWN_DATASETS = tuple(
    sorted(
        set().union(*(getattr(ov_utils, name) for name in dir(ov_utils) if name.startswith("PREDEFINED_"))) - {"auto"}
    )
)


def check_dataset_name(name: str) -> None:
    """Checks that `name` is `auto`, an existing file, or a data set that optimum-intel knows by name.

    Raises:
        SCAPError: otherwise.
    """
    check_name(name, KNOWN_DATASETS)


def build_samples(
    model: OVBaseModel,
    config: SCAPConfig,
    dataset: Any = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> dict[str, list[Any]]:
    """Calibration inputs for every OpenVINO model inside `model`, by the name that `model.ov_models` gives it.

    Args:
        model: any optimum-intel model.
        config: number, length and seed of the samples, and the dataset where `dataset` is None.
        dataset: None, the name of a dataset, a local file, `auto`, a `datasets.Dataset` (of text, or of model inputs),
            an `nncf.Dataset`, an iterable of model inputs or of strings, or a dict of datasets of model inputs by
            submodel name.
        tokenizer: the tokenizer or where to load it from; by default the folder that the model was loaded from.
        trust_remote_code: whether a tokenizer may bring code of its own.

    Raises:
        SCAPError: if the dataset cannot be loaded, or is empty or too short.
    """
    dataset = config.dataset if dataset is None else dataset
    source = _folder(model) if tokenizer is None else tokenizer
    if isinstance(dataset, str | Path):
        samples = _from_text_or_name(model, config, str(dataset), source, trust_remote_code)
    elif isinstance(dataset, Mapping) and dataset and dataset.keys() <= model.ov_models.keys():
        samples = {name: _samples_of_part(name, part, config) for name, part in dataset.items()}
    else:
        samples = _from_object(model, config, dataset, source, trust_remote_code)
    if not any(samples.values()):
        raise SCAPError("the calibration dataset is empty")
    return samples


def _from_text_or_name(
    model: OVBaseModel, config: SCAPConfig, name: str, source: Any, trust_remote_code: bool
) -> dict[str, list[Any]]:
    check_dataset_name(name)
    if is_text_file(name):
        tokenizer = load_tokenizer(source, trust_remote_code)
        seq_len = clamp_length(config.seq_len, model.config, tokenizer)
        windows = token_windows(name, tokenizer, config.num_samples, seq_len)
        return _from_windows(model, config, windows, tokenizer)
    if name == "auto":
        if len(model.ov_models) > 1:
            raise SCAPError(
                f"dataset auto needs a model that is a decoder alone, a {type(model).__name__} is made of several; "
                "use a local .txt, .jsonl, .json or .parquet file, or pass a dataset"
            )
        tokenizer = load_tokenizer(source, trust_remote_code)
        return _from_windows(model, config, generated_samples(model, tokenizer, config), tokenizer)
    return _from_name(model, config, name, source, model.config, trust_remote_code)


def _from_object(
    model: OVBaseModel, config: SCAPConfig, dataset: Any, source: Any, trust_remote_code: bool
) -> dict[str, list[Any]]:
    parts = list(model.ov_models)
    by_part = f"pass a dict of samples by model ({', '.join(parts)})"
    if isinstance(dataset, Mapping) and len(parts) > 1:
        names = printable(", ".join(map(str, dataset)))
        raise SCAPError(f"a {type(model).__name__} is made of several models, of which {names} names none: {by_part}")
    reads_text = isinstance(model, OVModelForSeq2SeqLM) and model.main_input_name == "input_ids"
    if len(parts) > 1 and hasattr(dataset, "column_names") and not reads_text:
        return _from_builder(model, config, dataset, source, trust_remote_code)
    documents, samples = texts_or_samples(dataset, config.num_samples, _input_names(model))
    if documents is not None:
        tokenizer = load_tokenizer(source, trust_remote_code)
        seq_len = clamp_length(config.seq_len, model.config, tokenizer)
        windows = cut_into_windows(documents, tokenizer, config.num_samples, seq_len, "the calibration dataset")
        return _from_windows(model, config, windows, tokenizer)
    if len(parts) == 1:
        return {parts[0]: [_completed(model, sample) for sample in samples]}
    rows = [row for sample in samples for row in _token_rows(sample)] if reads_text else []
    if not rows:
        raise SCAPError(f"a {type(model).__name__} is made of several models: {by_part}")
    rows_config = config.model_copy(update={"num_samples": len(rows)})
    return _from_builder(model, rows_config, Dataset.from_list(rows), source, trust_remote_code)


def _token_rows(sample: Any) -> list[dict[str, list[int]]]:
    """The sequences of a sample, each with the inputs of an encoder."""
    inputs = inputs_of(sample)
    if isinstance(inputs, list):
        inputs = dict(zip(_TEXT_INPUTS, inputs, strict=False))
    arrays = {name: as_array(inputs[name]) for name in _TEXT_INPUTS if inputs.get(name) is not None}
    if "input_ids" not in arrays:
        raise SCAPError(f"the calibration sample {describe_sample(sample)} has no input_ids")
    arrays.setdefault("attention_mask", np.ones_like(arrays["input_ids"]))
    return [
        {name: values[index].tolist() for name, values in arrays.items()} for index in range(len(arrays["input_ids"]))
    ]


def _samples_of_part(name: str, dataset: Any, config: SCAPConfig) -> list[Any]:
    documents, samples = texts_or_samples(dataset, config.num_samples)
    if documents is not None:
        raise SCAPError(f"the dataset for {name} is text: pass model inputs")
    return list(samples)


def _from_windows(
    model: OVBaseModel, config: SCAPConfig, windows: list[dict[str, list[int]]], tokenizer: Any
) -> dict[str, list[Any]]:
    parts = list(model.ov_models)
    if len(parts) == 1:
        return {parts[0]: [_completed(model, {name: [ids] for name, ids in window.items()}) for window in windows]}
    return _from_builder(model, config, Dataset.from_list(windows), tokenizer, False)


def _from_builder(
    model: OVBaseModel, config: SCAPConfig, dataset: Any, source: Any, trust_remote_code: bool
) -> dict[str, list[Any]]:
    """What optimum-intel's helper collects while a model of several parts runs on `dataset`."""
    builder = OVCalibrationDatasetBuilder(model, seed=config.seed, trust_remote_code=trust_remote_code)
    helper_config = _helper_config(config, None, source)
    # The decoder is to write no more tokens than it takes.
    helper_config._dataset_kwargs["seq_len"] = clamp_length(_GENERATED_TOKENS, model.config)
    try:
        return _unpack(builder.build_from_dataset(helper_config, dataset))
    except Exception as error:  # it expects columns and processors that differ from model to model
        raise_interruption_behind(error)
        raise SCAPError(
            f"a {type(model).__name__} cannot be calibrated on this dataset: {first_line(error)}; pass a dict of "
            f"samples by model ({', '.join(model.ov_models)})"
        ) from error


def _completed(model: OVBaseModel, sample: Any) -> Any:
    """A sample with the inputs that can be told from those that are there, as a PyTorch model does itself."""
    names = _input_names(model)
    inputs = inputs_of(sample)
    if isinstance(inputs, list):
        if len(inputs) == len(names) or len(inputs) > len(_TEXT_INPUTS) or names[:1] != ["input_ids"]:
            return sample
        inputs = dict(zip(_TEXT_INPUTS, inputs, strict=False))
    inputs = {name: value for name, value in inputs.items() if value is not None}
    if "input_ids" not in inputs or inputs.keys() >= set(names):
        return inputs
    ids = torch.as_tensor(as_array(inputs["input_ids"]))
    if isinstance(model, OVModelForCausalLM):
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else torch.as_tensor(as_array(mask)).long()
        return {**model.prepare_inputs(input_ids=ids, attention_mask=mask), **inputs}
    # not every tokenizer makes them, and a single text is all of the first type
    defaults = {"attention_mask": torch.ones_like(ids).numpy(), "token_type_ids": torch.zeros_like(ids).numpy()}
    return {**{name: value for name, value in defaults.items() if name in names}, **inputs}


def _input_names(model: OVBaseModel) -> list[str]:
    """The names of the inputs of every model inside `model`, in order."""
    return [port.get_any_name() for part in model.ov_models.values() for port in part.inputs]


def _from_name(
    model: OVBaseModel, config: SCAPConfig, name: str, tokenizer: Any, model_config: Any, trust_remote_code: bool
) -> dict[str, list[Any]]:
    set_seed(config.seed % 2**32)
    builder = OVCalibrationDatasetBuilder(model, seed=config.seed, trust_remote_code=trust_remote_code)
    known = None if isinstance(tokenizer, str | Path) else tokenizer
    options = with_length(name, config.seq_len, model_config, known)
    try:
        return _unpack(builder.build_from_quantization_config(_helper_config(config, options, tokenizer)))
    except Exception as error:
        # What a missing network raises depends on the versions of datasets, huggingface_hub and httpx.
        raise_interruption_behind(error)
        raise SCAPError(
            f"calibration dataset {name!r} could not be loaded: {first_line(error)}; without network use a local "
            ".txt, .jsonl, .json or .parquet file, or auto"
        ) from error


def _helper_config(config: SCAPConfig, dataset: str | None, tokenizer: Any) -> OVQuantizationConfigBase:
    source = str(tokenizer) if isinstance(tokenizer, str | Path) else getattr(tokenizer, "name_or_path", None)
    return OVQuantizationConfigBase(
        num_samples=config.num_samples, dataset=dataset, tokenizer=source, processor=source
    )


def _unpack(datasets: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Lists of inputs from nncf.Dataset objects or plain iterables."""
    return {
        name: list(dataset.get_inference_data() if hasattr(dataset, "get_inference_data") else dataset)
        for name, dataset in datasets.items()
    }


def _folder(model: OVBaseModel) -> str:
    return str(getattr(model, "model_save_dir", None) or getattr(model.config, "_name_or_path", ""))
