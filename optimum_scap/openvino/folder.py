"""SCAP on a folder that optimum-intel exported."""

import gc
import shutil
from pathlib import Path
from typing import Any

import openvino as ov

from ..calibration import SCAPParameters
from ..config import SCAPConfig
from ..errors import SCAPError, first_line
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
    source: Path,
    output: Path,
    config: SCAPConfig,
    *,
    task: str = "auto",
    library: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: str | Path | None = None,
) -> None:
    """Sparsifies the exported OpenVINO model in `source` and writes the whole folder to `output`.

    Args:
        source: the exported model.
        output: an empty folder, or `source` itself, which nothing else must be using then.
        config: what to prune and how to calibrate.
        task: the task it was exported for; `auto` reads it from the config.
        library: `transformers` unless given.
        trust_remote_code: whether the model may bring code of its own.
        tokenizer: where to load the tokenizer from if the folder has none.

    Raises:
        SCAPError: if the model cannot be loaded, sparsified or written.
    """
    from ..sparsify import sparsify_activations

    check_folder(source)
    if task == "auto":
        task = infer_task(source, trust_remote_code)
    model = load_optimum_model(source, task, library, trust_remote_code)
    has_tokenizer = (source / "tokenizer_config.json").exists() or (source / "tokenizer.json").exists()
    tokenizer = source if has_tokenizer or tokenizer is None else tokenizer
    sparsify_activations(model, config, tokenizer=str(tokenizer), trust_remote_code=trust_remote_code)

    changed = {
        relative: submodel
        for name, relative in model._ov_model_paths.items()
        if read_parameters(submodel := model.ov_models[name]) is not None
    }
    if output.resolve() != source.resolve():
        replaced = {str(Path(relative).with_suffix(suffix)) for relative in changed for suffix in (".xml", ".bin")}
        _copy_folder(source, output, without=replaced)
    for relative, submodel in changed.items():
        save_model(submodel, output / f"{relative}.sparse.xml")
    written = list(changed)
    # The files that are replaced are mapped into memory as long as the model lives.
    del model, submodel, changed
    gc.collect()
    for relative in written:
        for suffix in (".bin", ".xml"):
            temporary = (output / f"{relative}.sparse.xml").with_suffix(suffix)
            temporary.replace((output / relative).with_suffix(suffix))


def _copy_folder(source: Path, output: Path, without: set[str]) -> None:
    def ignored(folder: str, names: list[str]) -> list[str]:
        relative = Path(folder).relative_to(source)
        return [name for name in names if str(relative / name) in without]

    shutil.copytree(source, output, ignore=ignored, dirs_exist_ok=True)


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
            f"the model could not be written to {path.parent}: {first_line(error)} ({free / 2**20:.0f} MiB are free)"
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
        raise SCAPError(f"model folder {folder}: config.json cannot be read: {first_line(error)}") from error
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
    extra = {"use_cache": _has_cache(folder)} if task.startswith("text-generation") else {}
    try:
        return getattr(optimum.intel, name).from_pretrained(
            str(folder), export=False, compile=False, trust_remote_code=trust_remote_code, **extra
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise SCAPError(f"model folder {folder} cannot be loaded as {name}: {first_line(error)}") from error


def _has_cache(folder: Path) -> bool:
    model = _read_model(folder / "openvino_model.xml")
    names = {name for port in model.inputs for name in port.get_names()}
    return bool(model.get_sinks()) or any(name.startswith(("past_key_values", "cache_params")) for name in names)


def _read_model(path: Path) -> ov.Model:
    if not path.with_suffix(".bin").exists():
        raise SCAPError(f"{path} has no weights: {path.with_suffix('.bin').name} is missing")
    try:
        return ov.Core().read_model(path)
    except RuntimeError as error:
        raise SCAPError(f"{path} cannot be read: {first_line(error)}") from error
