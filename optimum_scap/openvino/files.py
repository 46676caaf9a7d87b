"""A folder that optimum-intel exported: the models in it, and copying and writing them."""

import gc
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import openvino as ov
from pydantic import ValidationError

from ..core.config import describe_validation_error
from ..core.parameter_files import checkpoint_parameters
from ..core.parameters import SCAPParameters
from ..disk import DiskFullError, free_bytes, is_disk_full
from ..errors import SCAPError, first_line
from .backend import read_parameters
from .fused_ir import is_fused, read_fused_ir, readable
from .optimum_intel import quiet_offline_guess
from .threshold_ops import find_threshold_ops


# What git and the hub's client keep about the folder that they fetched.
_NOT_PART_OF_A_MODEL = (".git", ".cache")


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
    # What optimum-intel takes for one.
    found = folder.rglob("*openvino*_*.xml")
    return sorted(path for path in found if not path.stem.endswith(("tokenizer", "detokenizer")))


def check_is_portable(folder: Path) -> None:
    """Checks that no IR in `folder` holds the C++ operations.

    Raises:
        SCAPError: naming the IR that does.
    """
    for path in model_files(folder):
        if is_fused(path):
            raise SCAPError(f"{path} is fused, it holds the C++ operations: give the folder that it was fused from")


def read_folder_parameters(folder: Path) -> dict[str, SCAPParameters]:
    """The SCAP parameters of every sparse IR in `folder`, by file name. Fused ones need no extension for that.

    Raises:
        SCAPError: if the folder is missing, or holds no sparse model, or an IR cannot be read.
    """
    check_folder(folder)
    found, fused = {}, False
    for path in model_files(folder):
        if is_fused(path):
            fused, is_sparse = True, True
            parameters = _fused_parameters(path)
        else:
            model = read_model(path)
            parameters = read_parameters(model)
            is_sparse = parameters is not None or bool(find_threshold_ops(model))
        if parameters is None and is_sparse and (folder / "config.json").is_file():
            # exported by optimum-intel from a sparse PyTorch checkpoint, whose config.json came along
            parameters = checkpoint_parameters(folder)
        if parameters is not None:
            found[str(path.relative_to(folder))] = parameters
    if not found:
        reason = "it is fused, but says nothing of its thresholds" if fused else "the model is dense"
        raise SCAPError(f"model folder {folder} holds no SCAP parameters: {reason}")
    return found


def _fused_parameters(path: Path) -> SCAPParameters | None:
    parameters = read_fused_ir(path).parameters
    try:
        return None if parameters is None else SCAPParameters.model_validate_json(parameters)
    except ValidationError as error:
        raise SCAPError(f"{path}: its SCAP parameters are damaged: {describe_validation_error(error)}") from error


def save_beside(model: ov.Model, target: Path, library: Path | None = None) -> tuple[Path, Path]:
    """Saves `model` under a temporary name; (temporary, target) for `put_in_place`."""
    temporary = target.with_name(f"{target.stem}.new.xml")
    save_model(model, temporary, library)
    return temporary, target


def put_in_place(written: list[tuple[Path, Path]]) -> None:
    """Has the IRs that `save_beside` wrote take the places of those that they were made of."""
    gc.collect()
    for temporary, target in written:
        for suffix in (".bin", ".xml"):
            temporary.with_suffix(suffix).replace(target.with_suffix(suffix))


def model_and_weights(folder: Path) -> list[Path]:
    """The files of every IR in `folder`."""
    return [path.with_suffix(suffix) for path in model_files(folder) for suffix in (".xml", ".bin")]


def size_of(files: Iterable[Path]) -> int:
    """Bytes of `files`, each counted once."""
    return sum(path.stat().st_size for path in set(files) if path.exists())


def ir_files(models: Iterable[str]) -> set[str]:
    """The files of IRs that are called `models`, paths within their folder."""
    return {Path(name).with_suffix(suffix).as_posix() for name in models for suffix in (".xml", ".bin")}


def files_to_copy(source: Path) -> dict[str, Path]:
    """Every file of a model folder that goes along to another one, by its path within the folder.

    Links are followed as far as the folder itself and, in the hub's cache, the files that belong to it.

    Raises:
        SCAPError: for a link that leads elsewhere: nobody may find a private file in a model that they publish.
    """
    root = source.resolve()
    homes = [root, *(folder.parent / "blobs" for folder in root.parents if folder.name == "snapshots")]
    found: dict[str, Path] = {}
    for base, folders, files in os.walk(source):
        folders[:] = [name for name in folders if name not in _NOT_PART_OF_A_MODEL]
        for path in (Path(base) / name for name in (*folders, *files)):
            target = path.resolve()
            if path.is_symlink() and not _is_blob(target) and not any(home in target.parents for home in homes):
                raise SCAPError(
                    f"model folder {source}: {path.relative_to(source)} is a link to {target}, outside of the folder, "
                    "and is not copied; put the file itself there, or remove the link"
                )
            if path.is_symlink() and path.is_dir():
                raise SCAPError(
                    f"model folder {source}: {path.relative_to(source)} is a link to a folder and is not copied; put "
                    "the folder itself there, or remove the link"
                )
            if path.is_file():
                found[path.relative_to(source).as_posix()] = path
    return found


def _is_blob(path: Path) -> bool:
    """Whether a file is one that the hub's client keeps; older ones linked to it from any folder."""
    return path.parent.name == "blobs" and path.parent.parent.name.startswith("models--")


def copy_files(files: Mapping[str, Path], output: Path, without: set[str]) -> None:
    """Copies the files of a model folder, see `files_to_copy`, to `output`.

    Raises:
        SCAPError: if one cannot be read or written.
    """
    for name in files.keys() - without:
        try:
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(files[name], output / name)
        except OSError as error:
            if is_disk_full(error, output):
                raise DiskFullError(output) from error
            raise SCAPError(f"{files[name]} cannot be copied to {output}: {error.strerror or error}") from error


def save_model(model: ov.Model, path: Path, library: Path | None = None) -> None:
    """Writes an IR without changing its precision and checks that it is on disk as a whole.

    `library` is the extension that the IR's operations are from, if it holds any.

    Raises:
        SCAPError: if it could not be written completely, for example because no space is left.
    """
    try:
        ov.save_model(model, str(path), compress_to_fp16=False)
        read_model(path, library)
    except (RuntimeError, OSError, SCAPError) as error:
        if is_disk_full(error, path.parent):
            raise DiskFullError(path.parent) from error
        raise SCAPError(
            f"the model could not be written to {path.parent}: {first_line(error)} "
            f"({free_bytes(path.parent) / 2**20:.0f} MiB are free)"
        ) from error


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
    quiet_offline_guess()
    extra = {"use_cache": _has_cache(folder)} if task.startswith("text-generation") else {}
    try:
        return getattr(optimum.intel, name).from_pretrained(
            str(folder), export=False, compile=False, trust_remote_code=trust_remote_code, **extra
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise SCAPError(f"model folder {folder} cannot be loaded as {name}: {first_line(error)}") from error


def _has_cache(folder: Path) -> bool:
    model = read_model(folder / "openvino_model.xml")
    names = {name for port in model.inputs for name in port.get_names()}
    return bool(model.get_sinks()) or any(name.startswith(("past_key_values", "cache_params")) for name in names)


def read_model(path: Path, library: Path | None = None) -> ov.Model:
    """The IR at `path`; with the extension `library`, if it holds the C++ operations.

    Raises:
        SCAPError: if it cannot be read.
    """
    if not path.with_suffix(".bin").exists():
        raise SCAPError(f"{path} has no weights: {path.with_suffix('.bin').name} is missing")
    if library is None and is_fused(path):
        raise SCAPError(f"{path} is fused, it holds the C++ operations: give the folder that it was fused from")
    try:
        core = ov.Core()
        if library is not None:
            core.add_extension(str(library))
        return core.read_model(path)
    except (RuntimeError, UnicodeDecodeError) as error:
        raise SCAPError(f"{path} cannot be read: {first_line(readable(error, path))}") from error
