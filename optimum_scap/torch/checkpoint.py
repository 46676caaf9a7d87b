"""PyTorch checkpoints: what a folder holds, and loading the model in it."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint import check_loaded, check_quantization_method
from ..core.parameter_files import checkpoint_parameters
from ..core.parameters import QUANT_METHOD, SCAPParameters
from ..core.sites import layers_in_one_block
from ..errors import SCAPError, first_line, raise_interruption_behind
from ..tasks import check_model_exists, infer_task


_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt"),
)


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
    """What the sparse kernels of a checkpoint of float weights work on: {dtype: {(in_features, (out_features, ...))}}.

    Layers over one input (gate and up; q, k and v) run as one launch and make one entry with several out_features.

    Raises:
        SCAPError: if the checkpoint is dense or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    from .expert_layers import is_of_experts

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
    parameters = read_folder_parameters(folder)
    if parameters.quantization_config is not None:
        return {}
    layers = parameters.layers
    absent = [path for path in layers if path not in shapes and not is_of_experts(path)]
    if absent:
        raise SCAPError(f"{folder}: the weights of layer {absent[0]} are missing")
    two_dimensional = [path for path in layers if not is_of_experts(path)]
    for path in _conv1d_layers(folder, two_dimensional):  # which hold their weights the other way round
        dtype, in_features, out_features = shapes[path]
        shapes[path] = (dtype, out_features, in_features)
    for family in _families(parameters):
        dtype, _, in_features = shapes[family[0]]
        found.setdefault(dtype, set()).add((in_features, tuple(shapes[path][1] for path in family)))
    return found


def integer_kernel_shapes(folder: Path) -> dict[tuple[int, int, Any], set[tuple[int, tuple[int, ...]]]]:
    """As `kernel_shapes`, of a checkpoint of integer weights: by (bits, group size, dtype of the scales).

    Raises:
        SCAPError: if the checkpoint cannot be read.
    """
    from .quantized import QuantizedLinear
    from .readers import prepare_model

    parameters = read_folder_parameters(folder)
    found: dict[tuple[int, int, Any], set[tuple[int, tuple[int, ...]]]] = {}
    model = _model_without_weights(folder)
    if parameters.quantization_config is None or model is None:
        return found
    import torch

    prepare_model(model, parameters.quantization_config, sorted(folder.glob("*.safetensors")), torch.float32)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    for family in _families(parameters):
        storages = [layers[path].scap_storage for path in family if path in layers]
        together = len({storage.kind for storage in storages}) == 1
        for paths in [family] if together and len(storages) == len(family) else [(path,) for path in family]:
            if paths[0] in layers:
                first = layers[paths[0]]
                storage, in_features = first.scap_storage, first.in_features
                key = (storage.bits, in_features // storage.groups, storage.scale_dtype)
                found.setdefault(key, set()).add((in_features, tuple(layers[path].out_features for path in paths)))
    return found


def _families(parameters: SCAPParameters) -> list[tuple[str, ...]]:
    """The pruned layers, those that run together in one."""
    from .expert_layers import is_of_experts

    families = layers_in_one_block(parameters.found_sites(), parameters.layers)
    together = {path for family in families for path in family}
    families += [(path,) for path in parameters.layers if path not in together]
    # Kernels for experts are not tuned.
    return [family for family in families if not any(map(is_of_experts, family))]


def _model_without_weights(folder: Path) -> Any:
    """The model on the meta device; None if its code is not part of transformers."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model_class = getattr(transformers, next(iter(config.architectures or ()), ""), None)
        if model_class is None:
            return None
        with torch.device("meta"):
            return model_class(config)
    except Exception as error:  # a damaged config fails anywhere
        raise_interruption_behind(error)
        raise SCAPError(f"{folder}: config.json describes no model: {first_line(error)}") from error


def _conv1d_layers(folder: Path, layers: Iterable[str]) -> list[str]:
    """Those of the `layers` that are a Conv1D in the model; the names alone do not tell GPT-2 from Starcoder2."""
    from .apply import find_modules
    from .prunable import is_conv1d

    model = _model_without_weights(folder)
    if model is None:
        return []  # code that a model brings uses nn.Linear
    modules = find_modules(model, layers)
    return [path for path in layers if is_conv1d(modules[path][0])]


def load_model(model: str, task: str, dtype: str, device: str, options: dict[str, Any]) -> Any:
    """The transformers model in a folder or on the hub, whose checkpoint is checked to be whole.

    Arguments as of `folders.export_checkpoint`.

    Raises:
        SCAPError: if it cannot be loaded.
    """
    import torch
    from optimum.exporters.tasks import TasksManager

    from .readers import find_reader

    check_model_exists(model)
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise SCAPError(f"model folder {model} has no config.json: it holds no transformers model")
    quantization = _quantization(model, options)
    read_here = find_reader(quantization) is not None
    if not read_here:
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
        if read_here:
            options = {**options, "config": config_for_reading(model, options)}
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
    if quantization is None or quantization.get("quant_method") == QUANT_METHOD or read_here:
        check_loaded(loaded, info, model)
    return loaded


@contextmanager
def readable_folder(model: str, dtype: str) -> Iterator[str]:
    """Where `model` can be loaded from: itself, or, of a GGUF file, a folder that it is converted to meanwhile.

    Args:
        model: a folder, an id, or a GGUF file with the model's tokenizer beside it.
        dtype: of what is not quantized in a GGUF file; float16 for `auto`.

    Raises:
        SCAPError: if the GGUF file cannot be read, or there is no tokenizer.
    """
    file = Path(model)
    if file.suffix != ".gguf" or not file.is_file():
        yield model
        return
    import torch

    from .readers.gguf import convert_gguf

    beside = [file.parent / name for name in _TOKENIZER_FILES if (file.parent / name).is_file()]
    if not beside:
        raise SCAPError(
            f"{file}: there is no tokenizer.json beside it; put the files of the original model's tokenizer there, "
            "since transformers builds another one from some GGUF files"
        )
    with tempfile.TemporaryDirectory(prefix="optimum-scap-gguf-") as folder:
        convert_gguf(file, Path(folder), torch.float16 if dtype == "auto" else getattr(torch, dtype))
        for found in beside:
            shutil.copyfile(found, Path(folder) / found.name)
        yield folder


def config_for_reading(model: str, options: dict[str, Any] | None = None) -> Any:
    """The config of a quantized model that has its checkpoint read here, without the library that quantized it.

    Args:
        model: a folder or the id of a model on the hub.
        options: further arguments for from_pretrained.

    Raises:
        SCAPError: if the model is not quantized, or by a method that is not read.
    """
    from transformers import AutoConfig

    from .readers import find_reader

    options = options or {}
    quantization = _quantization(model, options)
    if find_reader(quantization) is None:
        method = None if quantization is None else quantization.get("quant_method")
        raise SCAPError(f"model {model} is " + ("not quantized" if method is None else f"of the method {method}"))
    config = AutoConfig.from_pretrained(model, **options)
    config.quantization_config = {"quant_method": QUANT_METHOD, "quantization_config": quantization}
    return config


def make_dense(config: Any) -> None:
    """Has the config of a model load without pruning; its integer weights, if it has such, are read here."""
    fields = getattr(config, "quantization_config", None)
    if fields is None:
        return
    from .readers import find_reader

    source = fields.get("quantization_config") if fields.get("quant_method") == QUANT_METHOD else fields
    if find_reader(source) is None:
        del config.quantization_config
    else:
        config.quantization_config = {"quant_method": QUANT_METHOD, "quantization_config": source}


def _quantization(model: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization_config in the config.json of `model`, if there is one."""
    from transformers import PretrainedConfig

    try:
        found = PretrainedConfig.get_config_dict(model, **options)[0].get("quantization_config")
    except Exception as error:  # loading the model says more
        raise_interruption_behind(error)
        return None
    return found if isinstance(found, dict) else None


def copy_preprocessors(model: str, output: Path, trust_remote_code: bool) -> None:
    """Writes the tokenizer and whatever else prepares inputs for `model` to `output`."""
    from optimum.utils.save_utils import maybe_save_preprocessors

    maybe_save_preprocessors(model, output, trust_remote_code=trust_remote_code)
