"""Checkpoints that others quantized: one file per kind, which reads the tensors of a layer and writes them back.

No integer and no scale changes on the way. The libraries that made a checkpoint are not needed. A further kind is a
file with a class derived from `Reader`, and its entry in `readers`.
"""

import types
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...core.roles import find_role
from ...core.sites import match_paths
from ...errors import SCAPError, first_line
from ...memory import give_back_freed
from ..linear import VECTORS
from ..quantized import QuantizedLinear, StoredTensor
from .base import Adopted, LayerShape, Reader
from .nncf import mark_layers, release


@cache
def readers() -> tuple[Reader, ...]:
    """Every kind of quantized checkpoint that is read."""
    from .awq import AWQReader
    from .compressed_tensors import CompressedTensorsReader
    from .gguf import GGUFReader
    from .gptq import GPTQReader
    from .nncf import NNCFReader
    from .torchao import TorchAOReader

    return CompressedTensorsReader(), GPTQReader(), AWQReader(), TorchAOReader(), GGUFReader(), NNCFReader()


def find_reader(config: Mapping[str, Any] | None) -> Reader | None:
    """The reader for checkpoints with this `quantization_config`; None if there is none."""
    if config is None:
        return None
    return next((reader for reader in readers() if reader.matches(config)), None)


class Headers:
    """What the headers of safetensors files say.

    Args:
        files: the files of a checkpoint.

    Raises:
        SCAPError: naming a file that cannot be read.
    """

    def __init__(self, files: Iterable[str | Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[str, str] = {}
        for file in files:
            if Path(file).suffix != ".safetensors":
                raise SCAPError(f"{file}: quantized checkpoints are read from safetensors files only")
            try:
                with safe_open(str(file), "pt") as content:
                    self.metadata.update(content.metadata() or {})
                    for name in content.keys():  # noqa: SIM118  no mapping
                        tensor = content.get_slice(name)
                        self.tensors[name] = StoredTensor(tuple(tensor.get_shape()), torch_dtype(tensor.get_dtype()))
            except (OSError, SafetensorError) as error:
                raise SCAPError(f"{file} cannot be read: {first_line(error)}") from error

    def layers(self, marker: str) -> dict[str, dict[str, StoredTensor]]:
        """See `stored_layers`."""
        return stored_layers(self.tensors, marker)


def stored_layers(tensors: Mapping[str, StoredTensor], marker: str) -> dict[str, dict[str, StoredTensor]]:
    """What a checkpoint holds of the weights of its quantized layers, by path and name below it.

    Args:
        tensors: all that it holds.
        marker: a tensor that every quantized layer has below its path, and no other layer.
    """
    paths = {name.removesuffix(f".{marker}") for name in tensors if name.endswith(f".{marker}")}
    found: dict[str, dict[str, StoredTensor]] = {path: {} for path in sorted(paths)}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        if path in found and last not in ("bias", *VECTORS.values()):
            found[path][last] = tensor
    return found


def prepare_model(
    model: nn.Module, config: Mapping[str, Any], files: Iterable[str | Path], dtype: torch.dtype
) -> None:
    """Puts a QuantizedLinear, without weights, in the place of each layer that a checkpoint holds quantized.

    Args:
        model: without weights, on the meta device.
        config: the `quantization_config` of the checkpoint.
        files: its safetensors files.
        dtype: of the activations.

    Raises:
        SCAPError: naming the file, the layer or the tensor that is wrong.
    """
    reader = find_reader(config)
    if reader is None:
        raise SCAPError(f"checkpoints quantized by {config.get('quant_method')} are not read")
    reader.check(config)
    headers = Headers(files)
    keep_metadata(model, reader.kept_metadata(headers.metadata))
    stored = headers.layers(reader.marker)
    if not stored:
        raise SCAPError(
            f"the checkpoint has no tensor called {reader.marker}, though it is to be quantized ({reader.name})"
        )
    modules = dict(model.named_modules())
    for path, found in match_paths(stored, modules).items():
        if found is None:
            continue  # of a head that this model does not have
        module = modules[found]
        if not isinstance(module, nn.Linear):
            raise SCAPError(f"layer {path}: a quantized {type(module).__name__} is not supported")
        layer = LayerShape(path, module.in_features, module.out_features)
        storage = reader.storage(config, layer, stored[path], headers.metadata)
        replacement = QuantizedLinear(*layer[1:], module.bias, storage, dtype, found)
        parent, _, name = found.rpartition(".")
        setattr(model.get_submodule(parent), name, replacement)
    check_weights_are_there(model, headers)


def keep_metadata(model: Any, metadata: dict[str, str]) -> None:
    """Remembers what the header of a file of `model` is to say when it is saved."""
    model._scap_file_metadata = metadata


def kept_metadata(model: Any) -> dict[str, str]:
    """What `keep_metadata` remembers."""
    return getattr(model, "_scap_file_metadata", {})


def check_weights_are_there(model: nn.Module, headers: Headers) -> None:
    """transformers initializes layers without weights, be it that some of their tensors are missing or all.

    Raises:
        SCAPError: naming the layer.
    """
    paths = {name.rpartition(".")[0] for name in headers.tensors}
    layers = [path for path, module in model.named_modules() if type(module) is nn.Linear]
    for path, found in match_paths(layers, paths).items():
        if found is None and find_role(path) not in (None, "head"):
            raise SCAPError(f"layer {path}: the checkpoint has no weights for it")
        if found is not None and f"{found}.weight" not in headers.tensors:
            there = next(name for name in headers.tensors if name.startswith(f"{found}."))
            raise SCAPError(f"layer {path}: its weights are incomplete, there is {there} but nothing to read it with")


def pack_model(model: nn.Module) -> None:
    """Packs the weights that were loaded, layer by layer.

    Raises:
        SCAPError: naming the layer and the tensor that is wrong.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and not module.is_packed:
            module.pack()
            give_back_freed()


def adopted(module: nn.Module, path: str) -> Adopted | None:
    """What a module holds that the library of a quantization method made; None if it is none.

    Raises:
        SCAPError: if it is one, but its weights are not read.
    """
    for reader in readers():
        found = reader.adopt(module, path)
        if found is not None:
            return found
    return None


def adopt_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes each layer that the library of a quantization method made a QuantizedLinear, in place.

    Raises:
        SCAPError: naming the layer whose weights are not read; earlier ones are changed then.
    """
    mark_layers(model)
    found = {path: (module, adopted(module, path)) for path, module in model.named_modules()}
    for path, (module, what) in found.items():
        if what is None:
            continue
        bound = types.MethodType(QuantizedLinear.forward, module)
        if "_old_forward" in vars(module):  # accelerate calls what it found when its hook was added
            module._old_forward = bound
        else:
            module.__dict__.pop("forward", None)
        for name in ("quantization_scheme", "quantization_status"):
            module.__dict__.pop(name, None)
        module._parameters.clear()
        module._buffers.clear()
        module.__class__ = QuantizedLinear
        QuantizedLinear.become(module, *what.layer[1:], what.bias, what.storage, dtype, path)
        module.take(what.tensors)
    release(model)


def torch_dtype(name: str) -> torch.dtype:
    """Of what the header of a safetensors file calls it."""
    from transformers.modeling_utils import str_to_torch_dtype

    return str_to_torch_dtype.get(name, torch.uint8)
