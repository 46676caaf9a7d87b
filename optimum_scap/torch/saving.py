"""What keeps a model from being saved, found before a calibration is spent on it, and saving itself."""

import copy
import logging
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..disk import DiskFullError, is_disk_full
from ..errors import SCAPError, first_line, raise_interruption_behind
from .quantized import QuantizedLinear
from .wrappers import has_adapters


logger = logging.getLogger(__name__)

_GENERATION_CONFIG = "generation_config.json"


def is_from_transformers(model: nn.Module) -> bool:
    """Whether `model` is a model of transformers; diffusers and others have a `save_pretrained` of their own."""
    cls = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    return cls is not None and isinstance(model, cls)


def check_can_be_saved(model: nn.Module) -> None:
    """Checks all that `save_pretrained` of a transformers model refuses to write; other models pass.

    Raises:
        SCAPError: naming what is wrong and what to do.
    """
    if not is_from_transformers(model):
        return
    problem = generation_config_problem(model)
    if problem is not None:
        raise SCAPError(f"the model could not be saved: its generation_config is invalid: {problem}")
    try:
        _check_config(copy.deepcopy(model.config))
        _check_tied_weights(model)
    except Exception as error:  # configs and models bring checks of their own
        raise_interruption_behind(error)
        raise SCAPError(f"a {type(model).__name__} could not be saved: {first_line(error)}") from error


def generation_config_problem(model: Any) -> str | None:
    """Why the generation config of `model` cannot be saved, with transformers' advice, or None if it can be.

    transformers reads what it does not write: Llama 2's `temperature` without `do_sample`, for one.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not model.can_generate():
        return None
    try:
        config.validate(strict=True)
        config.to_json_string(keys_to_pop=["compile_config"])
    except (ValueError, TypeError, AttributeError) as error:
        issues = [line.strip("- ") for line in str(error).splitlines() if line.startswith("- ")]
        return " ".join(issues) or first_line(error)
    return None


@contextmanager
def valid_generation_config(model: Any) -> Iterator[bool]:
    """`model` with a generation config that can be saved: its own, but for the fields that keep it from that.

    Yields:
        Whether it is another than the model's own, which is put back in the end.
    """
    problem = generation_config_problem(model)
    if problem is None:
        yield False
        return
    own = model.generation_config
    model.generation_config = _without(own, re.findall(r"`(\w+)`:", problem))
    if generation_config_problem(model) is not None:
        model.generation_config = type(own).from_model_config(model.config)
    try:
        yield True
    finally:
        model.generation_config = own


def bytes_to_save(model: nn.Module) -> int:
    """How large the weights of `model` are on disk; those that several layers share count once."""
    if _holds_integers(model):  # a state_dict would write them anew
        values = {id(value): value for value in (*model.parameters(), *model.buffers())}.values()
        return sum(value.numel() * value.element_size() for value in values)
    tensors = {
        id(value): value for value in model.state_dict(keep_vars=True).values() if hasattr(value, "element_size")
    }
    return sum(value.numel() * value.element_size() for value in tensors.values())


@contextmanager
def saving_to(folder: Path) -> Iterator[None]:
    """Turns whatever goes wrong while a model is written to `folder` into a SCAPError."""
    try:
        yield
    except Exception as error:  # safetensors, transformers, tokenizers, and code that a model brings
        raise_interruption_behind(error)
        if is_disk_full(error, folder):
            raise DiskFullError(folder) from error
        raise SCAPError(f"the model could not be written to {folder}: {first_line(error)}") from error


def keep_generation_config(model: str, output: Path, options: dict[str, Any]) -> None:
    """Puts the generation_config.json of `model`, a folder or a hub id, into `output` as it is."""
    from transformers.utils.hub import cached_file

    known = {name: options[name] for name in ("cache_dir", "revision", "token", "local_files_only") if name in options}
    found = cached_file(model, _GENERATION_CONFIG, _raise_exceptions_for_missing_entries=False, **known)
    if found is not None:
        shutil.copyfile(found, output / _GENERATION_CONFIG)


def _without(config: Any, fields: list[str]) -> Any:
    default = type(config)()
    changed = copy.deepcopy(config)
    for name in fields:
        setattr(changed, name, getattr(default, name, None))
    return changed


def _check_config(config: Any) -> None:
    """What save_pretrained of a config does before it writes."""
    parameters: Any = getattr(config, "_get_generation_parameters", dict)()
    if parameters:
        raise ValueError(f"config holds {', '.join(parameters)}, which belong into generation_config")
    if hasattr(config, "validate"):
        config.validate()
    config.to_json_string()


def _check_tied_weights(model: Any) -> None:
    """safetensors holds no tensor twice: which of two names stays must be known."""
    weights = list(model.parameters())
    # Adapters are merged before; shards share memory that is not theirs.
    if has_adapters(model) or any(type(weight) is not nn.Parameter or weight.numel() == 0 for weight in weights):
        return
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    plain = dict(model.named_parameters(remove_duplicate=False))
    named = plain if _holds_integers(model) else model.state_dict()
    remove_tied_weights_from_state_dict(named, model)


def _holds_integers(model: nn.Module) -> bool:
    return any(isinstance(module, QuantizedLinear) for module in model.modules())
