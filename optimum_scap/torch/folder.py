"""Sparse PyTorch checkpoints: from a model to a folder, and what a folder holds."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..checkpoint import check_loaded, check_quantization_method
from ..core.config import SCAPConfig
from ..core.parameters import QUANT_METHOD, SCAPParameters, checkpoint_parameters
from ..core.roles import SHARED_INPUTS, find_role
from ..disk import check_space
from ..errors import SCAPError, first_line, raise_interruption_behind
from ..sparsify import sparsify_activations
from ..tasks import check_model_exists, infer_task


def is_torch_folder(folder: Path) -> bool:
    """Whether `folder` holds a PyTorch checkpoint (safetensors weights and a config.json)."""
    return (folder / "config.json").is_file() and next(folder.glob("*.safetensors"), None) is not None


def read_folder_parameters(folder: Path) -> SCAPParameters:
    """The SCAP parameters of a sparse PyTorch checkpoint.

    Raises:
        SCAPError: if config.json cannot be read, or the checkpoint is dense.
    """
    found = checkpoint_parameters(folder)
    if found is None:
        raise SCAPError(f"model folder {folder} holds no SCAP parameters: the model is dense")
    return found


def kernel_shapes(folder: Path) -> dict[Any, set[tuple[int, tuple[int, ...]]]]:
    """What the sparse kernels of a checkpoint work on: {dtype: {(in_features, (out_features, ...))}}.

    Layers over one input (gate and up; q, k and v) run as one launch and make one entry with several out_features.

    Raises:
        SCAPError: if the checkpoint is dense or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[Any, int, int]] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118  no mapping
                    if len(shape := weights.get_slice(name).get_shape()) == 2:
                        dtype = weights.get_slice(name)[:1].dtype
                        shapes[name.removesuffix(".weight")] = (dtype, shape[0], shape[1])
    except (OSError, SafetensorError) as error:
        raise SCAPError(f"{folder}: the weights cannot be read: {first_line(error)}") from error
    found: dict[Any, set[tuple[int, tuple[int, ...]]]] = {}
    layers = read_folder_parameters(folder).layers
    absent = [path for path in layers if path not in shapes]
    if absent:
        raise SCAPError(f"{folder}: the weights of layer {absent[0]} are missing")
    for path in _conv1d_layers(folder, layers):  # which hold their weights the other way round
        dtype, in_features, out_features = shapes[path]
        shapes[path] = (dtype, out_features, in_features)
    for path in layers:
        dtype, _, in_features = shapes[path]
        together = _layers_over_one_input(path, layers)
        if path == together[0]:
            found.setdefault(dtype, set()).add((in_features, tuple(shapes[sibling][1] for sibling in together)))
    return found


def _conv1d_layers(folder: Path, layers: Iterable[str]) -> list[str]:
    """Those of the `layers` that are a Conv1D in the model; the names alone do not tell GPT-2 from Starcoder2."""
    import torch
    import transformers

    from .backend import find_modules
    from .prunable import is_conv1d

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model_class = getattr(transformers, next(iter(config.architectures or ()), ""), None)
        if model_class is None:
            return []  # code that a model brings uses nn.Linear
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # a damaged config fails anywhere
        raise_interruption_behind(error)
        raise SCAPError(f"{folder}: config.json describes no model: {first_line(error)}") from error
    modules = find_modules(model, layers)
    return [path for path in layers if is_conv1d(modules[path][0])]


def _layers_over_one_input(path: str, layers: Iterable[str]) -> list[str]:
    """Of the pruned `layers`, those that run in one launch with `path`: q, k and v, or gate and up, of one block."""
    block = path.rpartition(".")[0]
    role = find_role(path)
    siblings = {find_role(layer): layer for layer in layers if layer.rpartition(".")[0] == block}
    for roles in SHARED_INPUTS:
        if role in roles and all(sibling in siblings for sibling in roles):
            return [siblings[sibling] for sibling in roles]
    return [path]


def export_checkpoint(
    model: str,
    output: Path,
    what: SCAPConfig | SCAPParameters,
    *,
    task: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    options: dict[str, Any] | None = None,
    on_calibrated: Callable[[SCAPParameters], None] | None = None,
) -> None:
    """Loads a transformers model, sparsifies it, and writes the checkpoint with its tokenizer to `output`.

    Args:
        model: a folder or the id of a model on the hub.
        output: an empty folder.
        what: what to prune and how to calibrate, or parameters to apply without calibration.
        task: the optimum task; `auto` reads it from config.json.
        dtype: `auto` (the checkpoint's own), `float32`, `float16` or `bfloat16`.
        device: `auto` (GPUs where there are any, spread by accelerate), or a torch device such as `cpu` or `cuda:0`.
        trust_remote_code: whether the model may bring code of its own.
        options: further arguments for from_pretrained, such as revision or cache_dir.
        on_calibrated: is given what the calibration found before anything is written.

    Raises:
        SCAPError: if the model cannot be loaded, sparsified or written. What would keep it from being written, and a
            disk that is too small for it, are found before the calibration.
    """
    # What a folder holds is read without torch.
    from .backend import read_parameters
    from .saving import (
        bytes_to_save,
        check_can_be_saved,
        keep_generation_config,
        saving_to,
        valid_generation_config,
    )

    options = {**(options or {}), "trust_remote_code": trust_remote_code}
    loaded = _load(model, task, dtype, device, options)
    check_space(output, bytes_to_save(loaded))
    with valid_generation_config(loaded) as changed:
        check_can_be_saved(loaded)
        sparsify_activations(loaded, what, tokenizer=model, trust_remote_code=trust_remote_code)
        found = read_parameters(loaded)
        if on_calibrated is not None and isinstance(what, SCAPConfig) and found is not None:
            on_calibrated(found)
        with saving_to(output):
            loaded.save_pretrained(output)
            _copy_preprocessors(model, output, trust_remote_code)
            if changed:
                keep_generation_config(model, output, options)


def _load(model: str, task: str, dtype: str, device: str, options: dict[str, Any]) -> Any:
    import torch
    from optimum.exporters.tasks import TasksManager

    check_model_exists(model)
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise SCAPError(f"model folder {model} has no config.json: it holds no transformers model")
    quantization = _quantization(model, options)
    check_quantization_method(quantization, model)
    if task == "auto":
        task = infer_task(model, options["trust_remote_code"])
    try:
        model_class = TasksManager.get_model_class_for_task(task.removesuffix("-with-past"), framework="pt")
    except (KeyError, ValueError) as error:
        raise SCAPError(f"--task: {first_line(error)}") from error
    if device == "auto" and torch.cuda.is_available():
        options = {**options, "device_map": "auto"}
    elif device != "auto":
        options = {**options, "device_map": device}
    try:
        # Nothing but safetensors is read: other formats can run code while they are opened.
        loaded, info = model_class.from_pretrained(
            model, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # damaged weights and missing libraries of quantized models fail anywhere
        raise_interruption_behind(error)
        hint = ", and no format but safetensors is read" if next(Path(model).glob("*.bin"), None) else ""
        # Without the library that quantized it transformers may say anything.
        kind = f"{quantization.get('quant_method')} model" if quantization is not None else "model"
        raise SCAPError(f"{kind} {model} cannot be loaded: {first_line(error)}{hint}") from error
    # Where the weights are quantized transformers' own quantizer says what belongs to them.
    if quantization is None or quantization.get("quant_method") == QUANT_METHOD:
        check_loaded(loaded, info, model)
    return loaded


def _quantization(model: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization_config in the config.json of `model`, if there is one."""
    from transformers import PretrainedConfig

    try:
        found = PretrainedConfig.get_config_dict(model, **options)[0].get("quantization_config")
    except Exception as error:  # loading the model says more
        raise_interruption_behind(error)
        return None
    return found if isinstance(found, dict) else None


def _copy_preprocessors(model: str, output: Path, trust_remote_code: bool) -> None:
    from optimum.utils.save_utils import maybe_save_preprocessors

    maybe_save_preprocessors(model, output, trust_remote_code=trust_remote_code)
