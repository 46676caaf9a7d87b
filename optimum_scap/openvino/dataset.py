"""Calibration inputs for optimum-intel models: named datasets, generated text and local files through one function."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum.intel import OVModelForCausalLM
from optimum.intel.openvino import utils as ov_utils
from optimum.intel.openvino.configuration import OVQuantizationConfigBase
from optimum.intel.openvino.modeling_base import OVBaseModel
from optimum.intel.openvino.quantization import OVCalibrationDatasetBuilder
from transformers import PreTrainedTokenizerBase, set_seed

from ..config import SCAPConfig
from ..errors import SCAPError, first_line
from ..text import is_text_file, load_tokenizer, token_windows


logger = logging.getLogger(__name__)

KNOWN_DATASETS = tuple(
    sorted({"auto"}.union(*(getattr(ov_utils, name) for name in dir(ov_utils) if name.startswith("PREDEFINED_"))))
)


def check_dataset_name(name: str) -> None:
    """Checks that `name` is `auto`, a name that optimum-intel's helper knows, or an existing file.

    Raises:
        SCAPError: otherwise, listing what can be used.
    """
    if is_text_file(name):
        if not Path(name).is_file():
            raise SCAPError(f"dataset file {name} does not exist or is not a file")
    elif name.partition(":")[0] not in KNOWN_DATASETS:
        raise SCAPError(
            f"dataset {name!r} is neither a file nor a name that optimum-intel knows; use auto, a .txt, .jsonl, .json "
            f"or .parquet file, or one of {', '.join(known for known in KNOWN_DATASETS if known != 'auto')}"
        )


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
        dataset: None, the name of a dataset, a local file, `auto`, a `datasets.Dataset`, an `nncf.Dataset`, an
            iterable of model inputs, or a dict of the last two by submodel name.
        tokenizer: the tokenizer or where to load it from; by default the folder that the model was loaded from.
        trust_remote_code: whether a tokenizer may bring code of its own.

    Raises:
        SCAPError: if the dataset cannot be loaded, or is empty or too short.
    """
    dataset = config.dataset if dataset is None else dataset
    if isinstance(dataset, str | Path):
        dataset = str(dataset)
        check_dataset_name(dataset)
        source = tokenizer if tokenizer is not None else _folder(model)
        if is_text_file(dataset):
            loaded = load_tokenizer(source, trust_remote_code)
            samples = _from_file(model, config, dataset, loaded)
        else:
            samples = _from_name(model, config, dataset, source, trust_remote_code)
    elif _is_hub_dataset(dataset):
        builder = OVCalibrationDatasetBuilder(model, seed=config.seed, trust_remote_code=trust_remote_code)
        helper_config = _helper_config(config, None, tokenizer or _folder(model))
        samples = _unpack(builder.build_from_dataset(helper_config, dataset))
    elif isinstance(dataset, Mapping):
        samples = _unpack(dataset)
    else:
        samples = _unpack({"model": dataset})
    if not any(samples.values()):
        raise SCAPError("the calibration dataset is empty")
    return samples


def _from_file(
    model: OVBaseModel, config: SCAPConfig, path: str, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Any]]:
    import torch

    seq_len = min(config.seq_len, getattr(model.config, "max_position_embeddings", None) or config.seq_len)
    windows = token_windows(path, tokenizer, config.num_samples, seq_len)
    if len(windows) < config.num_samples:
        logger.warning(
            "%s holds only %d samples of %d tokens, %d were asked for; calibrating on those",
            path,
            len(windows),
            seq_len,
            config.num_samples,
        )
    batches = [{name: torch.tensor([ids]) for name, ids in window.items()} for window in windows]
    if isinstance(model, OVModelForCausalLM):
        return {"model": [_prepare_inputs(model, batch) for batch in batches]}
    if model._ov_model_names == ["model"]:
        names = {name for port in model.model.inputs for name in port.get_names()}
        for batch in batches:  # not every tokenizer makes them, and a single text is all of the first type
            batch.setdefault("token_type_ids", torch.zeros_like(batch["input_ids"]))
        return {
            "model": [{name: value.numpy() for name, value in batch.items() if name in names} for batch in batches]
        }
    from datasets import Dataset

    builder = OVCalibrationDatasetBuilder(model, seed=config.seed)
    return _unpack(builder.build_from_dataset(_helper_config(config, None, tokenizer), Dataset.from_list(windows)))


def _prepare_inputs(model: OVModelForCausalLM, batch: dict[str, Any]) -> dict[str, Any]:
    inputs = model.prepare_inputs(**{name: batch[name] for name in ("input_ids", "attention_mask") if name in batch})
    return dict(inputs)


def named_text_samples(
    name: str, tokenizer: PreTrainedTokenizerBase, config: SCAPConfig, trust_remote_code: bool
) -> list[dict[str, Any]]:
    """Token windows of a text dataset that optimum-intel's helper knows, for a model of any framework.

    Raises:
        SCAPError: if it cannot be loaded.
    """
    return _from_name(_TextInputs(), config, name, tokenizer, trust_remote_code)["model"]


class _TextInputs(OVModelForCausalLM):
    """What the helper needs of a model to prepare text for it: nothing but that inputs are passed on as they are."""

    def __init__(self) -> None:
        pass

    def prepare_inputs(self, **inputs: Any) -> dict[str, Any]:
        return inputs


def _from_name(
    model: OVBaseModel, config: SCAPConfig, name: str, tokenizer: Any, trust_remote_code: bool
) -> dict[str, list[Any]]:
    set_seed(config.seed)
    builder = OVCalibrationDatasetBuilder(model, seed=config.seed, trust_remote_code=trust_remote_code)
    options = name if ":" in name or name == "auto" else f"{name}:seq_len={config.seq_len}"
    try:
        return _unpack(builder.build_from_quantization_config(_helper_config(config, options, tokenizer)))
    except Exception as error:
        # What a missing network raises depends on the versions of datasets, huggingface_hub and httpx.
        if name == "auto":
            hint = (
                "; it needs a model that generates text, for others use a local .txt, .jsonl, .json or .parquet file"
            )
        else:
            hint = "; without network use a local .txt, .jsonl, .json or .parquet file, or auto"
        raise SCAPError(f"calibration dataset {name!r} could not be loaded: {first_line(error)}{hint}") from error


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


def _is_hub_dataset(dataset: Any) -> bool:
    from datasets import Dataset, IterableDataset

    return isinstance(dataset, Dataset | IterableDataset)


def _folder(model: OVBaseModel) -> str:
    return str(getattr(model, "model_save_dir", None) or model.config._name_or_path)
