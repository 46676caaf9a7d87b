"""The front door for folders: sparsify what lies on a disk, and read what a folder says about itself.

Every job writes to a folder that is empty, or to the one it reads; that a half-written output never takes the place of
another is the business of `commands.staging`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .core.config import SCAPConfig
from .core.parameters import SCAPParameters
from .disk import check_space
from .errors import SCAPError
from .sparsify import find_parameters, sparsify_activations
from .tasks import infer_task


def read_folder_parameters(folder: Path) -> dict[str, SCAPParameters]:
    """The SCAP parameters of a model folder by file name, whichever framework it is for.

    Raises:
        SCAPError: if the folder is missing, holds no sparse model, or cannot be read.
    """
    from .torch.checkpoint import is_torch_folder

    if is_torch_folder(folder):
        from .torch.checkpoint import read_folder_parameters as read_checkpoint

        return {"config.json": read_checkpoint(folder)}
    from .openvino.files import read_folder_parameters as read_irs

    return read_irs(folder)


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
    weight_format: str | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    on_calibrated: Callable[[SCAPParameters], None] | None = None,
    recalibrate: bool = False,
) -> None:
    """Loads a transformers model, sparsifies it, and writes the checkpoint with its tokenizer to `output`.

    Args:
        model: a folder, a GGUF file with the model's tokenizer beside it, or the id of a model on the hub.
        output: an empty folder.
        what: what to prune and how to calibrate, or parameters to apply without calibration.
        task: the optimum task; `auto` reads it from config.json.
        dtype: `auto` (the checkpoint's own), `float32`, `float16` or `bfloat16`.
        device: `auto` (GPUs where there are any, spread by accelerate), or a torch device such as `cpu` or `cuda:0`.
        trust_remote_code: whether the model may bring code of its own.
        options: further arguments for from_pretrained, such as revision or cache_dir.
        weight_format, group_size, symmetric: how to quantize the weights of a float model first, see
            `torch.quantize.quantize_weights`; None leaves them as they are.
        on_calibrated: is given what the calibration found before anything is written.
        recalibrate: see `sparsify_activations`.

    Raises:
        SCAPError: if the model cannot be loaded, sparsified or written. What would keep it from being written, and a
            disk that is too small for it, are found before the calibration.
    """
    # What a folder holds is read without torch.
    from .torch.apply import read_parameters
    from .torch.checkpoint import copy_preprocessors, load_model, readable_folder
    from .torch.saving import (
        bytes_to_save,
        check_can_be_saved,
        keep_generation_config,
        saving_to,
        valid_generation_config,
    )

    options = {**(options or {}), "trust_remote_code": trust_remote_code}
    with readable_folder(model, dtype) as model:
        loaded = load_model(model, task, dtype, device, options)
        if weight_format is not None:
            from .torch.quantize import quantize_weights

            quantize_weights(loaded, weight_format, group_size, symmetric)  # type: ignore[arg-type]
        check_space(output, bytes_to_save(loaded))
        with valid_generation_config(loaded) as changed:
            check_can_be_saved(loaded)
            sparsify_activations(
                loaded, what, tokenizer=model, trust_remote_code=trust_remote_code, recalibrate=recalibrate
            )
            found = read_parameters(loaded)
            if on_calibrated is not None and isinstance(what, SCAPConfig) and found is not None:
                on_calibrated(found)
            with saving_to(output):
                loaded.save_pretrained(output)
                copy_preprocessors(model, output, trust_remote_code)
                if changed:
                    keep_generation_config(model, output, options)


def learn_parameters(
    model: str,
    output: Path,
    config: SCAPConfig,
    *,
    task: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    options: dict[str, Any] | None = None,
) -> SCAPParameters:
    """Loads a transformers model and learns what `config` says. The model stays dense.

    Args:
        model: a folder or the id of a model on the hub.
        output: an empty folder, to which the model is written if gains were learned: they are in its weights.
        config: what to learn, and from what.
        task: the optimum task; `auto` reads it from config.json.
        device: `auto` (GPUs where there are any) or a torch device.
        trust_remote_code: whether the model may bring code of its own.
        options: further arguments for from_pretrained, such as revision or cache_dir.

    Raises:
        SCAPError: if the model cannot be loaded, learned from or written.
    """
    import torch

    from .torch.checkpoint import copy_preprocessors, load_model
    from .torch.saving import bytes_to_save, keep_generation_config, saving_to, valid_generation_config

    options = {**(options or {}), "trust_remote_code": trust_remote_code}
    # Few CPUs compute in 16 bits at any speed.
    dtype = "auto" if torch.cuda.is_available() and not device.startswith("cpu") else "float32"
    loaded = load_model(model, task, dtype, device, options)
    with_gains = "gains" in config.learn
    if with_gains:
        check_space(output, bytes_to_save(loaded))
    with valid_generation_config(loaded) as changed:
        found = find_parameters(loaded, config, tokenizer=model, trust_remote_code=trust_remote_code)
        if with_gains:
            with saving_to(output):
                loaded.save_pretrained(output)
                copy_preprocessors(model, output, trust_remote_code)
                if changed:
                    keep_generation_config(model, output, options)
    return found


def sparsify_folder(
    source: Path,
    output: Path,
    config: SCAPConfig | SCAPParameters,
    *,
    task: str = "auto",
    library: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: str | Path | None = None,
    on_calibrated: Callable[[SCAPParameters], None] | None = None,
    recalibrate: bool = False,
) -> None:
    """Sparsifies the exported OpenVINO model in `source` and writes the whole folder to `output`.

    Args:
        source: the exported model.
        output: an empty folder, or `source` itself, which nothing else must be using then.
        config: what to prune and how to calibrate, or parameters to apply without calibration.
        task: the task it was exported for; `auto` reads it from the config.
        library: `transformers` unless given.
        trust_remote_code: whether the model may bring code of its own.
        tokenizer: where to load the tokenizer from if the folder has none.
        on_calibrated: called with what calibration found before anything is written.
        recalibrate: see `sparsify_activations`.

    Raises:
        SCAPError: if the model cannot be loaded, sparsified or written, or the disk has no space for it.
    """
    from .openvino.backend import read_parameters
    from .openvino.files import (
        check_folder,
        copy_files,
        files_to_copy,
        ir_files,
        load_optimum_model,
        model_and_weights,
        put_in_place,
        save_beside,
        size_of,
    )

    check_folder(source)
    copied = {} if output.resolve() == source.resolve() else files_to_copy(source)
    output.mkdir(parents=True, exist_ok=True)
    check_space(output, size_of([*copied.values(), *model_and_weights(source)]))
    if task == "auto":
        task = infer_task(source, trust_remote_code)
    model = load_optimum_model(source, task, library, trust_remote_code)
    has_tokenizer = (source / "tokenizer_config.json").exists() or (source / "tokenizer.json").exists()
    tokenizer = source if has_tokenizer or tokenizer is None else tokenizer
    sparsify_activations(
        model, config, tokenizer=str(tokenizer), trust_remote_code=trust_remote_code, recalibrate=recalibrate
    )

    changed: dict[str, Any] = {}
    found: list[SCAPParameters] = []
    for name, relative in model._ov_model_paths.items():
        parameters = read_parameters(submodel := model.ov_models[name])
        if parameters is not None:
            changed[relative] = submodel
            found.append(parameters)
    if on_calibrated is not None and found:
        on_calibrated(SCAPParameters.merged(found))
    copy_files(copied, output, without=ir_files(changed))
    written = [save_beside(submodel, output / relative) for relative, submodel in changed.items()]
    # The files that are replaced are mapped into memory as long as the model lives.
    del model, submodel, changed
    put_in_place(written)


def fuse_folder(source: Path, output: Path, precision: str | None = None) -> Path:
    """Fuses the sparse models in `source` and writes the whole folder to `output` (empty, or `source` itself).

    Args:
        source: the exported sparse model.
        output: an empty folder, or `source` itself, which nothing else must be using then.
        precision: of the operations, for good: only the classes of this package can change it when they load the
            model. `f32`, `split` or `bf16`, see `extension.nodes.create_linear`; by default bf16 where this CPU has
            it, else split.

    Returns:
        The compiled extension, without which the result cannot be read.

    Raises:
        SCAPError: if nothing in the folder can be fused, something in it is fused already, the extension cannot be
            built, or the disk has no space.
    """
    from .openvino.extension.build import build_extension
    from .openvino.files import (
        check_is_portable,
        copy_files,
        files_to_copy,
        ir_files,
        model_and_weights,
        model_files,
        put_in_place,
        read_model,
        save_beside,
        size_of,
    )
    from .openvino.fuse import is_operation
    from .openvino.modeling import extend_core, fused_clone

    check_is_portable(source)
    copied = {} if output.resolve() == source.resolve() else files_to_copy(source)
    output.mkdir(parents=True, exist_ok=True)
    check_space(output, size_of([*copied.values(), *model_and_weights(source)]))
    library = build_extension()
    extend_core(library)
    fused = {}
    for path in model_files(source):
        model = read_model(path)
        clone = fused_clone(model, precision=precision)
        if any(is_operation(node) for node in clone.get_ops()):
            fused[str(path.relative_to(source))] = clone
    if not fused:
        raise SCAPError(f"model folder {source}: no layer can be fused, their weights are of kinds that stay stock")
    copy_files(copied, output, without=ir_files(fused))
    written = [save_beside(clone, output / relative, library) for relative, clone in fused.items()]
    del fused, model, clone
    put_in_place(written)
    return library
