"""sparsify_activations: the one entry point, for every kind of model."""

import sys
from pathlib import Path
from typing import Any

from .core.config import SCAPConfig
from .core.parameters import SCAPParameters
from .errors import SCAPError


def sparsify_activations(
    model: Any,
    config: SCAPConfig | SCAPParameters | str,
    dataset: Any = None,
    *,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Any:
    """Applies Statistical Calibrated Activation Pruning (SCAP, arXiv 2412.07174) to a model, after training.

    The input activations of each selected fully connected layer are pruned where `|x_i - mode| <= threshold`; mode
    and threshold are calibrated on `dataset` so that the target sparsity is realised while all layers are sparse.

    Args:
        model: a `torch.nn.Module` (any transformers model among them), an `openvino.Model`, or any optimum-intel
            `OVModel*`, with or without compressed weights. It is changed in place, and not at all if anything fails
            before calibration is complete.
        config: what to prune; a string is parsed by `SCAPConfig.from_spec`. SCAPParameters (`load_parameters`) are
            applied as they are, without calibration and without a dataset.
        dataset: an iterable of model inputs (dicts or whatever else maps names to arrays, tensors or lists; inputs in
            order; single inputs), an `nncf.Dataset`, a DataLoader, or a `datasets.Dataset` of model inputs. But for an
            `openvino.Model`, which has no tokenizer, also strings, a `datasets.Dataset` with a column of text, the
            name of a dataset that optimum-intel's helper knows, a local .txt, .jsonl, .json or .parquet file, or
            `auto`; by default `config.dataset`.
        tokenizer: (not for `openvino.Model`) the tokenizer or where to load it from; by default the model's folder.
        trust_remote_code: (not for `openvino.Model`) whether the tokenizer may bring code of its own.

    Returns:
        `model`.

    Raises:
        SCAPError: (a ValueError) if the model is of another kind or sparse already, nothing in it matches the config,
            the dataset is unusable, a layer's activations are NaN, infinite or all zero, or a transformers model could
            not be saved afterwards (its generation config, for one).
    """
    if isinstance(config, str):
        config = SCAPConfig.from_spec(config)
    if isinstance(config, SCAPParameters):
        if dataset is not None:
            raise SCAPError("SCAPParameters are applied without calibration: no dataset is needed")
        return _apply(model, config)
    if _is_instance(model, "torch.nn", "Module"):
        return _sparsify_torch_model(model, config, dataset, tokenizer, trust_remote_code)
    if _is_instance(model, "openvino", "Model"):
        return _sparsify_openvino_model(model, config, dataset)
    if _is_instance(model, "optimum.intel.openvino.modeling_base", "OVModelHostMixin"):
        return _sparsify_optimum_model(model, config, dataset, tokenizer, trust_remote_code)
    raise _unsupported(model)


def _apply(model: Any, parameters: SCAPParameters) -> Any:
    if _is_instance(model, "torch.nn", "Module"):
        from .torch.backend import apply_parameters

        apply_parameters(model, parameters)
    elif _is_instance(model, "openvino", "Model"):
        from .openvino.backend import apply_parameters as apply_to_models

        apply_to_models({"model": model}, parameters)
    elif _is_instance(model, "optimum.intel.openvino.modeling_base", "OVModelHostMixin"):
        from .openvino.backend import apply_parameters as apply_to_models

        apply_to_models(_submodels(model), parameters)
        model.clear_requests()
    else:
        raise _unsupported(model)
    return model


def _sparsify_torch_model(
    model: Any, config: SCAPConfig, dataset: Any, tokenizer: str | Path | Any, trust_remote_code: bool
) -> Any:
    from .torch.backend import check_model, sparsify_model
    from .torch.dataset import build_samples
    from .torch.wrappers import unwrap

    inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    check_model(inner, config)
    config = _with_dataset(config, dataset)
    # Behind wrappers and adapters is the model that knows its config and how to write text.
    samples = build_samples(unwrap(inner), config, dataset, tokenizer, trust_remote_code)
    sparsify_model(inner, config, samples)
    return model


def _sparsify_openvino_model(model: Any, config: SCAPConfig, dataset: Any) -> Any:
    from .data.samples import texts_or_samples
    from .openvino.backend import sparsify_models

    documents: Any = None
    if dataset is not None and not isinstance(dataset, str | Path):
        names = [port.get_any_name() for port in model.inputs if port.get_names()]
        documents, samples = texts_or_samples(dataset, config.num_samples, names)
    if dataset is None or isinstance(dataset, str | Path) or documents is not None:
        raise SCAPError("an openvino.Model has no tokenizer: pass a dataset of model inputs, not of text")
    config = config.model_copy(update={"dataset": "custom"})
    sparsify_models({"model": model}, config, {"model": list(samples)})
    return model


def _sparsify_optimum_model(
    model: Any, config: SCAPConfig, dataset: Any, tokenizer: str | Path | Any, trust_remote_code: bool
) -> Any:
    from .openvino.backend import check_models, sparsify_models
    from .openvino.dataset import build_samples

    submodels = _submodels(model)
    check_models(submodels, config)
    config = _with_dataset(config, dataset)
    try:
        samples = build_samples(model, config, dataset, tokenizer, trust_remote_code)
        sparsify_models(submodels, config, samples)
    finally:
        model.clear_requests()
    return model


def _submodels(model: Any) -> dict[str, Any]:
    submodels = dict(model.ov_models)
    if any(_is_instance(submodel, "openvino", "CompiledModel") for submodel in submodels.values()):
        raise SCAPError("the model was loaded with compile_only=True and cannot be changed; load it without")
    return submodels


def _with_dataset(config: SCAPConfig, dataset: Any) -> SCAPConfig:
    """`config` with the dataset that is really used: its name, or `custom` for an object."""
    if dataset is None:
        return config
    name = str(dataset) if isinstance(dataset, str | Path) else "custom"
    return config.model_copy(update={"dataset": name})


def _unsupported(model: Any) -> SCAPError:
    return SCAPError(
        f"models of type {type(model).__module__}.{type(model).__name__} are not supported; pass a torch.nn.Module, "
        "an openvino.Model or an optimum-intel OVModel"
    )


def _is_instance(value: Any, module: str, name: str) -> bool:
    """isinstance without importing the module: where it was never imported, nothing can be an instance."""
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(value, cls)
