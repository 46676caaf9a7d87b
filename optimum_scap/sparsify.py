"""sparsify_activations: the one entry point, for every kind of model."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .core.backend import Backend, apply_parameters
from .core.calibration import Allocation, Calibration
from .core.config import Experts, SCAPConfig
from .core.parameters import SCAPParameters
from .core.recalibration import Recalibration
from .errors import SCAPError


def sparsify_activations(
    model: Any,
    config: SCAPConfig | SCAPParameters | str,
    dataset: Any = None,
    *,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    allocation: Allocation | None = None,
    recalibrate: bool = False,
) -> Any:
    """Applies Statistical Calibrated Activation Pruning (SCAP, arXiv 2412.07174) to a model, after training.

    The input activations of each selected fully connected layer are pruned where `|x_i - mode| <= threshold`; mode
    and threshold are calibrated on `dataset` so that the target sparsity is realized while all layers are sparse.

    Args:
        model: a `torch.nn.Module` (any transformers model among them), an `openvino.Model`, or any optimum-intel
            `OVModel*`, with or without compressed weights. It is changed in place, and not at all if anything fails
            before calibration is complete.
        config: what to prune; a string is parsed by `SCAPConfig.from_spec`. SCAPParameters (`load_parameters`) are
            applied as they are, without calibration and without a dataset, unless `recalibrate` is set.
        dataset: an iterable of model inputs (dicts or whatever else maps names to arrays, tensors or lists; inputs in
            order; single inputs), an `nncf.Dataset`, a DataLoader, or a `datasets.Dataset` of model inputs. But for an
            `openvino.Model`, which has no tokenizer, also strings, a `datasets.Dataset` with a column of text, the
            name of a dataset that optimum-intel's helper knows, a local .txt, .jsonl, .json or .parquet file, or
            `auto`; by default `config.dataset`.
        tokenizer: (not for `openvino.Model`) the tokenizer or where to load it from; by default the model's folder.
        trust_remote_code: (not for `openvino.Model`) whether the tokenizer may bring code of its own.
        allocation: what redistributes the sparsity that the targets ask for among the layers: a function of the groups
            of layers that prune alike, the statistics of their inputs, and the weights that each group reads, which
            returns a sparsity per group (see `core.calibration.Allocation`).
        recalibrate: whether the modes and thresholds of SCAPParameters are calibrated anew, on `dataset` or what they
            were calibrated on; for weights that were quantized since. Targets, scales and bias corrections stay.

    Returns:
        `model`.

    Raises:
        SCAPError: (a ValueError) if the model is of another kind or sparse already, nothing in it matches the config,
            the dataset is unusable, a layer's activations are NaN, infinite or all zero, or a transformers model could
            not be saved afterward (its generation config, for one).
    """
    if isinstance(config, str):
        config = SCAPConfig.from_spec(config)
    if isinstance(config, SCAPParameters):
        if dataset is not None and not recalibrate:
            raise SCAPError("SCAPParameters are applied without calibration: no dataset is needed")
    elif recalibrate:
        raise SCAPError("recalibrate is for SCAPParameters: what a config says is calibrated in any case")
    backends = _backends(model, config.experts if isinstance(config, SCAPConfig) else "shared")
    try:
        if isinstance(config, SCAPParameters):
            if recalibrate:
                recalibration = Recalibration(backends, config)
                # Nothing is learned any more: no samples for that.
                asked = config.config.model_copy(update={"learn": ()})
                samples = _samples(model, asked, dataset, tokenizer, trust_remote_code)
                recalibration.run(samples, _name_of(dataset, asked))
            else:
                apply_parameters(backends, config)
            return model
        calibration = Calibration(backends, config)
        samples = _samples(model, config, dataset, tokenizer, trust_remote_code)
        calibration.run(samples, _name_of(dataset, config), allocation)
    finally:
        if _is_optimum_model(model):
            model.clear_requests()
    return model


def find_parameters(
    model: Any,
    config: SCAPConfig,
    dataset: Any = None,
    *,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> SCAPParameters:
    """What `sparsify_activations` would apply; the model stays dense. Gains that are learned are in its weights.

    Args and errors as of `sparsify_activations`.
    """
    backends = _backends(model, config.experts)
    calibration = Calibration(backends, config)
    samples = _samples(model, config, dataset, tokenizer, trust_remote_code)
    return calibration.run(samples, _name_of(dataset, config), apply=False)


def _backends(model: Any, experts: Experts) -> Mapping[str, Backend]:
    """The models inside of `model` that calibration runs, by name."""
    if _is_instance(model, "torch.nn", "Module"):
        from .torch.backend import TorchBackend

        return {"model": TorchBackend(_uncompiled(model), experts)}
    if _is_instance(model, "openvino", "Model"):
        from .openvino.backend import OpenVINOBackend

        return {"model": OpenVINOBackend(model)}
    if _is_optimum_model(model):
        from .openvino.backend import OpenVINOBackend

        submodels = dict(model.ov_models)
        if any(_is_instance(submodel, "openvino", "CompiledModel") for submodel in submodels.values()):
            raise SCAPError("the model was loaded with compile_only=True and cannot be changed; load it without")
        return {name: OpenVINOBackend(submodel, name) for name, submodel in submodels.items()}
    raise SCAPError(
        f"models of type {type(model).__module__}.{type(model).__name__} are not supported; pass a torch.nn.Module, "
        "an openvino.Model or an optimum-intel OVModel"
    )


def _samples(
    model: Any, config: SCAPConfig, dataset: Any, tokenizer: str | Path | Any, trust_remote_code: bool
) -> Mapping[str, Iterable[Any]]:
    """Calibration inputs for each of those models."""
    if _is_instance(model, "torch.nn", "Module"):
        from .torch.dataset import build_samples
        from .torch.wrappers import unwrap

        # Behind wrappers and adapters is the model that knows its config and how to write text.
        inner = unwrap(_uncompiled(model))
        if config.learn:
            # What thresholds are calibrated on is the first part of it.
            more = max(config.num_samples, config.learn_samples)
            config = config.model_copy(update={"num_samples": more})
        return {"model": build_samples(inner, config, dataset, tokenizer, trust_remote_code)}
    if _is_optimum_model(model):
        from .openvino.dataset import build_samples as build_openvino_samples

        return build_openvino_samples(model, config, dataset, tokenizer, trust_remote_code)
    return {"model": _samples_without_tokenizer(model, config, dataset)}


def _samples_without_tokenizer(model: Any, config: SCAPConfig, dataset: Any) -> list[Any]:
    from .data.samples import texts_or_samples

    documents: Any = None
    if dataset is not None and not isinstance(dataset, str | Path):
        names = [port.get_any_name() for port in model.inputs if port.get_names()]
        documents, samples = texts_or_samples(dataset, config.num_samples, names)
    if dataset is None or isinstance(dataset, str | Path) or documents is not None:
        raise SCAPError("an openvino.Model has no tokenizer: pass a dataset of model inputs, not of text")
    return list(samples)


def _name_of(dataset: Any, config: SCAPConfig) -> str:
    """What the record says about the data: its name, or `custom` for an object."""
    if dataset is None:
        return config.dataset
    return str(dataset) if isinstance(dataset, str | Path) else "custom"


def _uncompiled(model: Any) -> Any:
    return getattr(model, "_orig_mod", model)  # what torch.compile wraps


def _is_optimum_model(model: Any) -> bool:
    return _is_instance(model, "optimum.intel.openvino.modeling_base", "OVModelHostMixin")


def _is_instance(value: Any, module: str, name: str) -> bool:
    """isinstance without importing the module: where it was never imported, nothing can be an instance."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)
