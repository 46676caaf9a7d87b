"""Puts parameters on a torch model: layers of it prune their inputs, blocks run theirs together."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..core.config import Experts
from ..core.parameters import QUANT_METHOD, SCAPParameters
from ..core.roles import module_path
from ..core.sites import match_paths
from ..errors import SCAPError
from .blocks import convert_blocks
from .blocks.experts import expert_layers
from .convert import check_vectors, convert
from .expert_layers import ExpertLayer, SCAPExpertLayer, is_of_one_expert
from .linear import is_pruned
from .owners import Owners
from .prunable import is_linear, is_quantized, why_dense
from .quantized import QuantizedLinear
from .readers import adopt_layers, find_reader, keep_metadata, kept_metadata
from .readers.compressed_tensors import packed_config
from .readers.nncf import hooked_by_nncf, mark_layers
from .saving import is_from_transformers
from .wrappers import saved_modules, unwrap, why_adapter_forbids


def apply_parameters(model: nn.Module, parameters: SCAPParameters, *, from_checkpoint: bool = False) -> None:
    """Makes the layers of `model` prune their inputs by parameters that are known, without calibration.

    Args:
        model: a dense model.
        parameters: of any part of its layers, also where a head was added to, or taken from, the model that was
            calibrated.
        from_checkpoint: whether vectors per channel come with the weights, later.

    Raises:
        SCAPError: naming the layer that the model does not have or that cannot be pruned; the model is untouched then.
    """
    check_is_dense(model)
    mark_layers(unwrap(model))
    found = find_modules(model, parameters.layers)
    forbidden = why_adapter_forbids(model)
    vectors = {
        path: (None, None)
        if from_checkpoint
        else (parameters.criterion(path), parameters.tensor(path, "bias_correction"))
        for path in parameters.layers
    }
    for path, modules in found.items():
        criterion, correction = vectors[path]
        for module in modules:
            reason = forbidden.get(module) or _why_not_prunable(module)
            if reason is None and criterion is not None:
                reason = check_vectors(module, criterion, correction)
            if reason is not None:
                raise SCAPError(f"layer {path} cannot be pruned: {reason}")
    if not from_checkpoint:
        parameters = parameters.model_copy(update={"quantization_config": adopt(model)})
    mark_tied(model, [module for modules in found.values() for module in modules])
    for path, modules in found.items():
        criterion, correction = vectors[path]
        for module in modules:
            convert(module, parameters.layers[path], parameters.apply_to, criterion, correction)
    for module in pruned_layers(model).values():
        if isinstance(module, SCAPExpertLayer):
            module.prepare()
    sites = parameters.found_sites()
    named = [path for site in sites for path in site.layers if path not in found]
    found.update(find_modules(model, named, missing_is_error=False))
    convert_blocks(model, found, sites, parameters.dense_layers, parameters.sites is not None)
    _attach(unwrap(model), parameters)


def mark_tied(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Tells `layers` of `model`, pruned or about to be, which of them share their weights with another module."""
    owners = Owners(model)
    for layer in layers:
        if isinstance(layer, QuantizedLinear | ExpertLayer):
            continue
        layer._scap_is_tied = owners[layer.weight] > 1  # type: ignore[assignment]


def read_parameters(model: nn.Module) -> SCAPParameters | None:
    """The SCAP parameters that `model` carries, None if it is dense."""
    found = getattr(unwrap(model), "_scap_parameters", None)
    if not isinstance(found, SCAPParameters):
        return None
    if not any(layer.tensors for layer in found.layers.values()):
        return found
    modules = find_modules(model, found.layers)
    tensors = {
        f"{path}.scap_{name}": getattr(modules[path][-1], f"scap_{name}").float().cpu().numpy()
        for path, layer in found.layers.items()
        for name in layer.tensors
    }
    return found.with_named_tensors(tensors)


def pruned_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` that prune their inputs, by the module paths that SCAPParameters know them by."""
    return {path: module for path, module in saved_modules(model) if is_pruned(module)}


def check_is_dense(model: nn.Module) -> None:
    """Raises a SCAPError if layers of `model` are pruned already."""
    if pruned_layers(model):
        raise SCAPError("the model is sparse already; start from the model without SCAP")


def source_config(model: nn.Module) -> dict[str, Any] | None:
    """The `quantization_config` of the checkpoint that a model with integer weights is; None if it has none.

    Raises:
        SCAPError: naming the method, if checkpoints of its kind are not read.
    """
    inner: Any = unwrap(model)
    quantizer = getattr(inner, "hf_quantizer", None)
    config = getattr(getattr(inner, "config", None), "quantization_config", None)
    if quantizer is not None:
        config = quantizer.quantization_config
    if hooked_by_nncf(model):
        raise SCAPError("the model is quantized or pruned by NNCF already; start from the model without")
    if config is None:
        return None
    fields: dict[str, Any] = dict(config) if isinstance(config, Mapping) else config.to_dict()
    method = fields.get("quant_method")
    if method == QUANT_METHOD:
        return fields.get("quantization_config")
    if getattr(method, "value", method) == "gguf" and "config_groups" not in fields:
        return None  # newer transformers leave this on models whose GGUF weights they multiplied out
    reader = find_reader(fields)
    if reader is None:
        name = getattr(method, "value", method)
        raise SCAPError(f"the model is quantized ({name}), which is not read; start from the model without")
    reader.check(fields)
    return reader.saved_config(fields)


def adopt(model: nn.Module) -> dict[str, Any] | None:
    """Takes over what the library of a quantization method made of the layers, so that they run, and are saved, here.

    Returns:
        The `quantization_config` of the checkpoint that the model is saved as, but for SCAP; None if it is not
        quantized.

    Raises:
        SCAPError: naming a layer whose weights are not read.
    """
    source = source_config(model)
    inner: Any = unwrap(model)
    quantizer = getattr(inner, "hf_quantizer", None)
    if quantizer is not None and not kept_metadata(inner):
        reader = find_reader(quantizer.quantization_config.to_dict())
        keep_metadata(inner, {} if reader is None else reader.made_metadata(inner))
        _forget_conversions(inner, quantizer)
    adopt_layers(inner, _dtype_of(inner))
    storages = {
        path: module.scap_storage for path, module in saved_modules(model) if isinstance(module, QuantizedLinear)
    }
    if source is None and storages:
        others = [path for path, module in saved_modules(model) if isinstance(module, nn.Linear)]
        return packed_config(storages, others)
    return source


def _forget_conversions(model: Any, quantizer: Any) -> None:
    """transformers converts what it saves back by what it converted on loading; the quantizer's part is done here."""
    done = {tuple(conversion.source_patterns) for conversion in quantizer.get_weight_conversions()}
    conversions = getattr(model, "_weight_conversions", None)
    if done and conversions is not None:
        model._weight_conversions = [one for one in conversions if tuple(one.source_patterns) not in done]


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The type of the activations."""
    return next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.get_default_dtype())


def find_modules(
    model: nn.Module, paths: Iterable[str], *, missing_is_error: bool = True
) -> dict[str, list[nn.Module]]:
    """The modules called `paths`, also where a head has been added to, or taken from, the model that was calibrated.

    One module each, but for the copies that adapters bring.

    Raises:
        SCAPError: naming a path that the model does not have, if that is an error.
    """
    by_path: dict[str, list[nn.Module]] = {}
    paths = list(paths)
    thresholds: Experts = "each" if any(map(is_of_one_expert, paths)) else "shared"
    for path, module in saved_modules(unwrap(model)):
        by_path.setdefault(path, []).append(module)
        for layer_path, layer in expert_layers(path, module, thresholds).items():
            by_path.setdefault(layer_path, []).append(layer)
    # Without what DataParallel, torch.compile and PEFT put around it.
    bare = {path: path if path in by_path else module_path(path) for path in paths}
    names = match_paths(bare.values(), by_path)
    found = {}
    for path, known in bare.items():
        name = names[known]
        if name is not None:
            found[path] = by_path[name]
        elif missing_is_error:
            raise SCAPError(f"layer {path} does not exist in the model, a {type(unwrap(model)).__name__}")
    return found


def _attach(model: nn.Module, parameters: SCAPParameters) -> None:
    model._scap_parameters = parameters  # type: ignore[assignment]
    if is_from_transformers(model):
        from .quantizer import attach

        attach(model, parameters)


def _why_not_prunable(module: nn.Module) -> str | None:
    if isinstance(module, ExpertLayer):
        return None
    if is_linear(module) or is_quantized(module):
        return why_dense(module)
    return f"it is a {type(module).__name__}, not a fully connected layer with floating-point weights"
