"""Whether a checkpoint holds what its config says. transformers only warns of weights that it leaves out or makes up.

Importing this module imports neither torch nor transformers.
"""

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .core.parameters import QUANT_METHOD
from .errors import SCAPError, first_line, raise_interruption_behind


logger = logging.getLogger(__name__)

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Tables that older versions of transformers stored, and newer ones compute.
_TABLES = ("inv_freq", "position_ids", "masked_bias", "causal_mask", "cos_cached", "sin_cached", "num_batches_tracked")
# Fields that count further blocks, for speculation, which transformers does not run.
_SPECULATIVE_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")


def check_checkpoint(folder: str | Path) -> None:
    """Checks that the weights in a folder are those of the model that its config.json describes; reads no weights.

    Whatever is no folder with safetensors weights of a class in transformers passes: ids on the hub, GGUF files,
    models that bring code of their own.

    Raises:
        SCAPError: naming a weight that the model has no place for, one that is missing, a file that is damaged, or a
            quantization method that transformers does not know.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not any((folder / name).is_file() for name in (_WEIGHTS, _INDEX)):
        return
    config = _read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    check_quantization_method(quantization, folder)
    weights = _weights_without_values(folder)
    if _is_quantized(quantization):
        return  # its weights have other names and shapes
    loaded = _load_without_values(folder, config, weights)
    if loaded is not None:
        check_loaded(*loaded, folder)


def check_quantization_method(quantization: Any, model: str | Path) -> None:
    """Checks that transformers knows the method of a `quantization_config`, or there is none.

    Args:
        quantization: the field of config.json, None if there is none.
        model: the folder or id that it is from.

    Raises:
        SCAPError: naming the method.
    """
    if not isinstance(quantization, Mapping) or quantization.get("load_in_8bit") or quantization.get("load_in_4bit"):
        return
    from transformers import __version__
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        name = "no quant_method" if method is None else f"the quant_method {method!r}"
        raise SCAPError(
            f"model {model}: the quantization_config in config.json names {name}, which transformers {__version__} "
            "does not know: it would read the weights without their scales"
        )


def check_loaded(model: Any, info: Mapping[str, Any], source: str | Path) -> None:
    """Checks that a model took all that its checkpoint holds and lacks nothing, but for heads of another task.

    Args:
        model: a transformers model as `from_pretrained` made it, on any device.
        info: what from_pretrained says with `output_loading_info=True`.
        source: where it was loaded from, for messages.

    Raises:
        SCAPError: naming a weight.
    """
    if info.get("mismatched_keys"):
        name, found, wanted = sorted(info["mismatched_keys"])[0]
        raise SCAPError(f"model {source}: {name} has the shape {list(found)}, config.json says {list(wanted)}")
    missing = sorted(info["missing_keys"])
    lacking = [name for name in missing if _is_of_the_body(model, name)]
    if lacking:
        raise SCAPError(f"model {source} cannot be loaded: {len(lacking)} weights are missing, such as {lacking[0]}")
    if missing:
        logger.warning("%s: %d weights are missing and random, such as %s", source, len(missing), missing[0])
    tables = {name for name, _ in model.named_buffers()}  # those that the model makes by itself
    unexpected = [
        name
        for name in sorted(info["unexpected_keys"])
        if name.rpartition(".")[2] not in _TABLES and not tables & _names_in(model, name)
    ]
    lost = [name for name in unexpected if _is_of_a_layer(model, name)]
    if lost:
        raise SCAPError(
            f"model {source}: {len(lost)} weights have no place in the {type(model).__name__} that config.json "
            f"describes, such as {lost[0]}: it may name fewer layers, another architecture, or no quantization"
        )
    if unexpected:
        logger.warning(
            "%s: %d weights are left out, such as %s: a %s has no place for them",
            *(source, len(unexpected), unexpected[0], type(model).__name__),
        )


def _is_quantized(quantization: Any) -> bool:
    if not isinstance(quantization, Mapping):
        return False
    return quantization.get("quant_method") != QUANT_METHOD or quantization.get("quantization_config") is not None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise SCAPError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise SCAPError(f"{path} cannot be read: it holds no JSON object")
    return content


def _weights_without_values(folder: Path) -> dict[str, Any]:
    """What the headers of the safetensors files say, as tensors on the meta device."""
    from safetensors import SafetensorError, safe_open

    weights = {}
    for file, names in _files(folder).items():
        try:
            with safe_open(file, "pt") as content:
                held = set(content.keys())
                for name in held if names is None else names & held:
                    weights[name] = _meta_tensor(content.get_slice(name))
        except (OSError, SafetensorError) as error:
            raise SCAPError(f"{file} cannot be read: {first_line(error)}") from error
        absent = sorted((names or set()) - held)
        if absent:
            raise SCAPError(f"{file} does not hold {absent[0]}, which {_INDEX} says it does")
    return weights


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """The files that transformers reads, and which weights it looks for in each; None for all that it holds."""
    if (folder / _WEIGHTS).is_file():
        return {folder / _WEIGHTS: None}
    places = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise SCAPError(f"{folder / _INDEX} holds no weight_map from weights to files")
    files: dict[Path, set[str] | None] = {}
    for name, file in places.items():
        if not (folder / file).is_file():
            raise SCAPError(f"{folder / file} does not exist, and {_INDEX} says that it holds {name}")
        names = files.setdefault(folder / file, set())
        assert names is not None
        names.add(name)
    return files


def _meta_tensor(content: Any) -> Any:
    import torch
    from transformers.modeling_utils import str_to_torch_dtype

    dtype = str_to_torch_dtype.get(content.get_dtype(), torch.uint8)  # the newest formats are packed bytes
    return torch.empty(content.get_shape(), dtype=dtype, device="meta")


def _load_without_values(folder: Path, fields: Mapping[str, Any], weights: dict[str, Any]) -> tuple[Any, Any] | None:
    """Has transformers load the weights, with all that it does to their names and shapes; None if it cannot."""
    import transformers

    named = fields.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    model_class = getattr(transformers, architecture, None) if isinstance(architecture, str) else None
    if model_class is None or fields.get("auto_map"):
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with _silence():
            return model_class.from_pretrained(
                None,
                config=config,
                state_dict=weights,
                device_map="meta",
                ignore_mismatched_sizes=True,  # they are in the info
                output_loading_info=True,
            )
    except Exception as error:  # whoever loads it in earnest says more
        raise_interruption_behind(error)
        logger.info("%s: the weights were not compared with config.json: %s", folder, first_line(error))
        return None


@contextmanager
def _silence() -> Iterator[None]:
    """transformers says of weights at length what is said here in a line."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _is_of_the_body(model: Any, name: str) -> bool:
    """Whether a weight that is missing is of blocks, embeddings or norms; heads and poolers are made anew."""
    import torch

    prefix = getattr(model, "base_model_prefix", "")
    if prefix and prefix in model._modules and not name.startswith(f"{prefix}."):
        return False
    owners = list(_owners(model, name))
    inside = any(isinstance(owner, torch.nn.ModuleList) for owner in owners)
    return inside or isinstance(owners[-1], torch.nn.Embedding) or type(owners[-1]).__name__.endswith("Norm")


def _is_of_a_layer(model: Any, name: str) -> bool:
    """Whether a weight that the model has no place for is of a layer or block that it has, or of one block more."""
    return any(_has_layer_for(model, candidate) for candidate in _names_in(model, name))


def _names_in(model: Any, name: str) -> set[str]:
    """What a weight can be called in `model`: its checkpoint may be of one with a head, or of one without."""
    prefix = getattr(model, "base_model_prefix", "")
    bare = name.removeprefix(f"{prefix}.") if prefix else name
    return {name, bare, f"{prefix}.{bare}"}


def _has_layer_for(model: Any, name: str) -> bool:
    import torch

    parts = name.split(".")
    owners = list(_owners(model, name))
    last, rest = owners[-1], parts[len(owners) - 1 :]
    if isinstance(last, torch.nn.ModuleList) and rest[0].isdigit():
        return int(rest[0]) >= len(last) + _speculative_layers(model.config)
    if rest == ["bias"] and "weight" not in last._parameters and last._modules:
        return False  # a causal mask of GPT-2's time
    if any(isinstance(owner, torch.nn.ModuleList) for owner in owners):
        return True
    return len(rest) == 1 and bool(last._parameters) and not hasattr(last, "base_model_prefix")


def _owners(model: Any, name: str) -> Iterator[Any]:
    """The modules on the way to a weight, as far as they are there."""
    yield model
    for part in name.split(".")[:-1]:
        model = model._modules.get(part)
        if model is None:
            return
        yield model


def _speculative_layers(config: Any) -> int:
    counts: Collection[Any] = [getattr(config.get_text_config(), name, 0) for name in _SPECULATIVE_LAYERS]
    return sum(count for count in counts if isinstance(count, int))
