"""SCAP on a folder that optimum-intel exported."""

import gc
import shutil
from pathlib import Path
from typing import Any

import openvino as ov

from ..calibration import SCAPParameters
from ..config import SCAPConfig
from ..errors import SCAPError
from .backend import read_parameters


def check_folder(folder: Path) -> None:
    """Checks that `folder` holds an exported OpenVINO model.

    Raises:
        SCAPError: if it is missing or holds no IR.
    """
    if not folder.is_dir():
        raise SCAPError(f"model folder {folder} does not exist or is not a folder")
    if not model_files(folder):
        raise SCAPError(
            f"model folder {folder} holds no OpenVINO model (openvino_*.xml); optimum-cli export openvino makes one"
        )


def model_files(folder: Path) -> list[Path]:
    """The IRs of an exported folder, tokenizers left out."""
    return sorted(
        path for path in folder.rglob("openvino_*.xml") if not path.stem.endswith(("tokenizer", "detokenizer"))
    )


def read_folder_parameters(folder: Path) -> dict[str, SCAPParameters]:
    """The SCAP parameters of every sparse IR in `folder`, by file name.

    Raises:
        SCAPError: if the folder is missing, or holds no sparse model, or an IR cannot be read.
    """
    check_folder(folder)
    found = {}
    for path in model_files(folder):
        parameters = read_parameters(_read_model(path))
        if parameters is not None:
            found[str(path.relative_to(folder))] = parameters
    if not found:
        raise SCAPError(f"model folder {folder} holds no SCAP parameters: the model is dense")
    return found


def sparsify_folder(
    folder: Path,
    config: SCAPConfig,
    *,
    task: str = "auto",
    library: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: str | Path | None = None,
) -> SCAPParameters:
    """Sparsifies the model in `folder` in place.

    Args:
        folder: an exported OpenVINO model, which nothing else is using.
        config: what to prune and how to calibrate.
        task: the task it was exported for; `auto` reads it from the config.
        library: `transformers` unless given.
        trust_remote_code: whether the model may bring code of its own.
        tokenizer: where to load the tokenizer from if the folder has none.

    Raises:
        SCAPError: if the model cannot be loaded, sparsified or written.
    """
    from ..sparsify import sparsify_activations

    check_folder(folder)
    if task == "auto":
        task = infer_task(folder, trust_remote_code)
    model = load_optimum_model(folder, task, library, trust_remote_code)
    has_tokenizer = (folder / "tokenizer_config.json").exists() or (folder / "tokenizer.json").exists()
    source = folder if has_tokenizer or tokenizer is None else tokenizer
    sparsify_activations(model, config, tokenizer=str(source), trust_remote_code=trust_remote_code)

    rewritten = []
    for name, relative in model._ov_model_paths.items():
        submodel = model.ov_models[name]
        if read_parameters(submodel) is not None:
            target = folder / relative
            temporary = target.with_name(f"{target.stem}.scap.xml")
            save_model(submodel, temporary)
            rewritten.append((temporary, target))
        del submodel
    # The files that are replaced are mapped into memory as long as the model lives.
    del model
    gc.collect()
    parameters = None
    for temporary, target in rewritten:
        for suffix in (".bin", ".xml"):
            temporary.with_suffix(suffix).replace(target.with_suffix(suffix))
        parameters = read_parameters(_read_model(target))
    if parameters is None:
        raise SCAPError(f"model folder {folder}: the sparse model could not be read back")
    return parameters


def save_model(model: ov.Model, path: Path) -> None:
    """Writes an IR without changing its precision and checks that it is on disk as a whole.

    Raises:
        SCAPError: if it could not be written completely, for example because no space is left.
    """
    try:
        ov.save_model(model, str(path), compress_to_fp16=False)
        _read_model(path)
    except (RuntimeError, OSError, SCAPError) as error:
        free = shutil.disk_usage(path.parent).free
        raise SCAPError(
            f"the model could not be written to {path.parent}: {_first_line(error)} ({free / 2**20:.0f} MiB are free)"
        ) from error


def infer_task(folder: Path, trust_remote_code: bool = False) -> str:
    """The optimum task of the model in `folder`, from the architecture that its config.json names.

    Raises:
        SCAPError: if there is no usable config.json; the user can then give --task.
    """
    import transformers
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoConfig

    hint = "give the task with --task"
    if not (folder / "config.json").is_file():
        raise SCAPError(f"model folder {folder} has no config.json to tell its task; {hint}")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise SCAPError(f"model folder {folder}: config.json cannot be read: {_first_line(error)}") from error
    architectures = getattr(config, "architectures", None) or [""]
    model_class = getattr(transformers, architectures[0], None)
    if model_class is None:
        raise SCAPError(f"model folder {folder}: config.json names no known architecture ({architectures[0]}); {hint}")
    try:
        task = TasksManager.infer_task_from_model(model_class)
    except ValueError as error:
        raise SCAPError(f"model folder {folder}: no task is known for {architectures[0]}; {hint}") from error
    return f"{task}-with-past" if task in ("text-generation", "text2text-generation") else task


def load_optimum_model(folder: Path, task: str, library: str | None = None, trust_remote_code: bool = False) -> Any:
    """The exported model in `folder` as the optimum-intel class for `task`, not compiled.

    Raises:
        SCAPError: if optimum-intel has no class for the task or the model cannot be loaded.
    """
    import optimum.intel
    from optimum.intel.openvino.utils import _HEAD_TO_AUTOMODELS

    name = _HEAD_TO_AUTOMODELS.get(task.replace("-with-past", ""))
    if library == "sentence_transformers":
        name = "OVSentenceTransformer"
    if name is None:
        raise SCAPError(f"optimum-intel has no OpenVINO class for the task {task!r}")
    extra = {} if not task.startswith("text") else {"use_cache": task.endswith("with-past")}
    try:
        return getattr(optimum.intel, name).from_pretrained(
            str(folder), export=False, compile=False, trust_remote_code=trust_remote_code, **extra
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise SCAPError(f"model folder {folder} cannot be loaded as {name}: {_first_line(error)}") from error


def _read_model(path: Path) -> ov.Model:
    if not path.with_suffix(".bin").exists():
        raise SCAPError(f"{path} has no weights: {path.with_suffix('.bin').name} is missing")
    try:
        return ov.Core().read_model(path)
    except RuntimeError as error:
        raise SCAPError(f"{path} cannot be read: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # OpenVINO puts the place in its own source first and the reason last.
    return (lines[-1] if "Exception from" in lines[0] else lines[0]) if lines else type(error).__name__
