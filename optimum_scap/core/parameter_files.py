"""The files of SCAPParameters.

Two kinds are read: our own JSON, with the tensors that belong to it in a safetensors file beside it, and
`calibrated_thresholds.json` of the reference implementation (a mapping from module path to module_name, demode_method,
mode, threshold, target_sparsity and hook_type).
"""

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from ..errors import SCAPError, first_line, printable
from .config import Estimator, SCAPConfig, Sparsity, Target, describe_validation_error
from .parameters import QUANT_METHOD, Float32, LayerParameters, SCAPParameters
from .roles import find_role


if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


# No file of parameters comes near: a thousand layers are 200 KB.
_LARGEST_FILE = 2**28


class _ReferenceLayer(BaseModel):
    """One entry of the reference's calibrated_thresholds.json. A pre-hook prunes what enters the module."""

    module_name: str
    demode_method: Estimator
    mode: Float32
    threshold: Annotated[Float32, Field(ge=0.0)]
    target_sparsity: Sparsity
    hook_type: Literal["pre_hook"] = "pre_hook"


def load_parameters(path: str | Path) -> SCAPParameters:
    """Reads the parameters of a model from a JSON file, and the tensors that belong to it from the file beside it.

    Args:
        path: a file that `save_parameters` wrote, or the reference implementation's `calibrated_thresholds.json`.

    Raises:
        SCAPError: naming the file, the layer and the field that is wrong.
    """
    path = Path(path)
    source = f"SCAP parameters {printable(str(path), 1000)}"
    content = _read_json(path, source)
    if not isinstance(content, dict) or not content:
        raise SCAPError(f"{source}: expected a JSON object with an entry per layer")
    _refuse_repeated_names(content, source)
    try:
        if "layers" in content:
            found = SCAPParameters.model_validate(content)
            has_tensors = any(layer.tensors for layer in found.layers.values())
            return found.with_named_tensors(_read_tensors(_tensor_file(path))) if has_tensors else found
        if not any(
            find_role(name) or isinstance(entry, dict) and "threshold" in entry for name, entry in content.items()
        ):
            raise SCAPError("this is neither what scap info --json writes nor a calibrated_thresholds.json")
        return _from_reference(content, path)
    except ValidationError as error:
        raise SCAPError(f"{source}: {describe_validation_error(error)}") from error
    except SCAPError as error:
        raise SCAPError(f"{source}: {error}") from error


def _tensor_file(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def _read_tensors(path: Path) -> "dict[str, NDArray[np.float32]]":
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise SCAPError(f"the tensors in {printable(str(path), 1000)} cannot be read: {first_line(error)}") from error


def checkpoint_parameters(folder: Path) -> SCAPParameters | None:
    """The SCAP parameters in the config.json of a model folder, None if it is there and holds none.

    Raises:
        SCAPError: if config.json cannot be read or its parameters are damaged.
    """
    path = folder / "config.json"
    source = printable(str(path), 1000)
    content = _read_json(path, source)
    found = content.get("quantization_config") if isinstance(content, dict) else None
    if not isinstance(found, dict) or found.get("quant_method") != QUANT_METHOD:
        return None
    return parameters_from_quantization_config(found, source)


def parameters_from_quantization_config(fields: dict[str, Any], source: str) -> SCAPParameters:
    """The SCAP parameters in the `quantization_config` of a checkpoint; `source` says in errors where it is from.

    Raises:
        SCAPError: naming the field that is wrong.
    """
    _refuse_repeated_names(fields, source)
    try:
        return SCAPParameters.model_validate({name: value for name, value in fields.items() if name != "quant_method"})
    except ValidationError as error:
        raise SCAPError(f"{source}: damaged SCAP parameters: {describe_validation_error(error)}") from error


def parameters_from_json(text: str, source: str) -> SCAPParameters:
    """The SCAP parameters that an IR carries; `source` says in errors where they are from.

    Raises:
        SCAPError: naming the field that is wrong.
    """
    content = _parse_json(text, source)
    _refuse_repeated_names(content, source)
    try:
        return SCAPParameters.model_validate(content)
    except ValidationError as error:
        raise SCAPError(f"{source} are damaged: {describe_validation_error(error)}") from error


class _Object(dict[str, Any]):
    """A JSON object that remembers a name which it held twice."""

    repeated: str | None = None


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    found = _Object(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        found.repeated = next(name for number, name in enumerate(names) if name in names[:number])
    return found


def _read_json(path: Path, source: str) -> Any:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
        raise SCAPError(f"{source} cannot be read: {printable(first_line(error))}") from error
    if len(content) > _LARGEST_FILE:
        raise SCAPError(f"{source} cannot be read: it is larger than {_LARGEST_FILE // 2**20} MiB")
    try:
        return _parse_json(content.decode("utf-8-sig"), source)
    except UnicodeDecodeError as error:
        raise SCAPError(f"{source} cannot be read: {first_line(error)}") from error


def _parse_json(text: str, source: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise SCAPError(f"{source} cannot be read: {first_line(error)}") from error


def _refuse_repeated_names(content: Any, source: str) -> None:
    """JSON leaves open which of two values of one name counts: neither is to prune a model."""
    pending = [("", content)]
    while pending:
        place, value = pending.pop()
        if isinstance(value, _Object) and value.repeated is not None:
            raise SCAPError(f"{source}: {printable(place + value.repeated)} is given twice")
        if isinstance(value, dict):
            pending += [(f"{place}{name}.", entry) for name, entry in value.items() if isinstance(entry, dict | list)]
        elif isinstance(value, list):
            pending += [(f"{place}{index}.", entry) for index, entry in enumerate(value)]


def save_parameters(parameters: SCAPParameters, path: str | Path) -> None:
    """Writes `parameters` as JSON, and its tensors, if it has any, to a safetensors file of the same name beside it.

    Each file appears complete or not at all.

    Raises:
        SCAPError: naming the file, if it cannot be written.
    """
    path = Path(path)
    tensors = parameters.named_tensors()
    if tensors:
        from safetensors.numpy import save

        _write(_tensor_file(path), save(tensors))
    _write(path, (parameters.model_dump_json(indent=2) + "\n").encode("utf-8"))


def _write(path: Path, content: bytes) -> None:
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        where = printable(str(path), 1000)
        raise SCAPError(f"SCAP parameters cannot be written to {where}: {printable(first_line(error))}") from error


def _from_reference(content: dict[str, Any], path: Path) -> SCAPParameters:
    layers: dict[str, LayerParameters] = {}
    for name, entry in content.items():
        role = find_role(name)
        if role is None:
            raise SCAPError(f"layer {printable(name)}: no role is known for a module of this name")
        try:
            found = _ReferenceLayer.model_validate(entry)
        except ValidationError as error:
            raise SCAPError(f"layer {printable(name)}: {describe_validation_error(error)}") from error
        layers[name] = LayerParameters(
            role=role,
            estimator=found.demode_method,
            target_sparsity=found.target_sparsity,
            mode=found.mode,
            threshold=found.threshold,
        )
    targets = {
        str(layer.role): Target(sparsity=layer.target_sparsity, estimator=layer.estimator) for layer in layers.values()
    }
    config = SCAPConfig(targets=targets, dataset=path.name)
    return SCAPParameters(version="reference", config=config, layers=layers)
