"""SCAP on a torch model: statistics through forward hooks, then the layers' own classes changed in place."""

import inspect
import logging
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import __version__
from ..core.calibration import KEEP_ALL, Site, Thresholding, Visit, calibrate, check_patterns, select_targets
from ..core.config import RoleTarget, SCAPConfig
from ..core.measuring import SkippedChannels
from ..core.parameters import QUANT_METHOD, LayerParameters, SCAPParameters
from ..core.roles import ROLES, find_role, module_path
from ..data.padding import Padding
from ..data.samples import describe_sample, inputs_of
from ..errors import SCAPError, first_line, raise_interruption_behind
from ..progress import length, run_over
from .blocks.gated import fuse_gated_blocks
from .blocks.shared_input import share_inputs
from .linear import convert, is_pruned, prune
from .prunable import hooked_by_nncf, is_fully_connected, is_linear, why_dense
from .saving import check_can_be_saved, is_from_transformers
from .statistics import TorchActivationStatistics
from .wrappers import has_adapters, saved_modules, unwrap, why_adapter_forbids


logger = logging.getLogger(__name__)


def sparsify_model(model: nn.Module, config: SCAPConfig, samples: Iterable[Any]) -> SCAPParameters:
    """Calibrates SCAP on a torch model and makes its layers prune their inputs, in place.

    Args:
        model: any module, on any device or several of them, offloaded by accelerate or not, in any float dtype.
        config: what to prune.
        samples: model inputs (dicts of keyword arguments, tuples, or single tensors); iterated several times.

    Returns:
        The parameters of all pruned layers. `model` is as it was if anything fails before calibration is complete.

    Raises:
        SCAPError: if the model is sparse already, nothing matches the config, or calibration is impossible.
    """
    layers = check_model(model, config)
    targets = select_targets([(path, find_role(path)) for path in layers], config)
    runner = _Runner(model, {path: layers[path] for path in targets}, samples)
    sites = runner.find_sites(targets)
    thresholds = calibrate(sites, runner, config.seed, TorchActivationStatistics)
    by_path = {path: (site.target, thresholds[site.key]) for site in sites for path in site.layers}
    found: dict[str, LayerParameters] = {}
    for path in targets:
        role = find_role(path)
        assert role is not None  # select_targets takes layers of known roles only
        target, thresholding = by_path[path]
        found[path] = LayerParameters(
            role=role,
            method=target.mode,
            target_sparsity=target.sparsity,
            mode=float(thresholding.mode),
            threshold=float(thresholding.threshold),
        )
    parameters = SCAPParameters(version=__version__, config=config, layers=found)
    apply_parameters(model, parameters)
    if has_adapters(model):
        logger.warning(
            "PEFT saves adapters without the model, and so without its thresholds; to keep both, save the merged "
            "model: model.merge_and_unload().save_pretrained(...)"
        )
    return parameters


def apply_parameters(model: nn.Module, parameters: SCAPParameters) -> None:
    """Makes the layers of `model` prune their inputs by parameters that are known, without calibration.

    Raises:
        SCAPError: naming the layer that the model does not have or that cannot be pruned; the model is untouched then.
    """
    _check_is_dense(model)
    found = find_modules(model, parameters.layers)
    forbidden = why_adapter_forbids(model)
    for path, modules in found.items():
        for module in modules:
            reason = forbidden.get(module) or _why_not_prunable(module)
            if reason is not None:
                raise SCAPError(f"layer {path} cannot be pruned: {reason}")
    _check_is_not_quantized(model)
    for path, modules in found.items():
        for module in modules:
            convert(module, parameters.layers[path], parameters.config.apply_to)
    fuse_gated_blocks(model)
    share_inputs(model)
    _attach(unwrap(model), parameters)


def read_parameters(model: nn.Module) -> SCAPParameters | None:
    """The SCAP parameters that `model` carries, None if it is dense."""
    found = getattr(unwrap(model), "_scap_parameters", None)
    return found if isinstance(found, SCAPParameters) else None


def pruned_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` that prune their inputs, by the module paths that SCAPParameters know them by."""
    return {path: module for path, module in saved_modules(model) if is_pruned(module)}


def check_model(model: nn.Module, config: SCAPConfig) -> dict[str, nn.Module]:
    """Checks, before any calibration data is made, that `config` can be applied to `model`.

    Returns:
        The fully connected layers by module path, see `pruned_layers`.

    Raises:
        SCAPError: if the model is sparse already or quantized, nothing in it matches the config, or it could not be
            saved with what the calibration finds.
    """
    _check_is_dense(model)
    forbidden = why_adapter_forbids(model)
    layers = {
        path: module for path, module in saved_modules(model) if is_fully_connected(module) and module not in forbidden
    }
    dense = _left_dense(model, forbidden)
    if not layers:
        raise SCAPError(
            "the model has no fully connected layer with floating-point weights to prune; quantized PyTorch models "
            f"are not supported yet{_first_of(dense)}"
        )
    _check_is_not_quantized(model)
    check_patterns({**layers, **dense}, config)
    roles = {path: find_role(path) for path in layers}
    present = set(roles.values())
    skipped = select_targets([(path, find_role(path)) for path in dense], config)
    dense = {path: dense[path] for path in skipped}
    if not select_targets(roles.items(), config):
        patterns = "; the include and exclude patterns leave none of those" if present & config.targets.keys() else ""
        raise SCAPError(
            f"no fully connected layer is left to prune: the targets name {', '.join(config.targets)}, the model has "
            f"{', '.join(role for role in ROLES if role in present) or 'no layer of a known role'}{patterns}"
            f"{_first_of(dense)}"
        )
    if dense:
        logger.warning("%d layers are left dense%s", len(dense), _first_of(dense))
    for role in config.targets:
        if role not in present:
            logger.info("the model has no layer of role %s", role)
    check_can_be_saved(unwrap(model))
    return layers


def _check_is_dense(model: nn.Module) -> None:
    if pruned_layers(model):
        raise SCAPError("the model is sparse already; start from the model without SCAP")


def _check_is_not_quantized(model: nn.Module) -> None:
    """Also of a model that is quantized in part: its checkpoint names one method, and so loses the other."""
    quantizer = getattr(unwrap(model), "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", QUANT_METHOD)
    if method != QUANT_METHOD:
        name = getattr(method, "value", method)
        raise SCAPError(f"the model is quantized ({name}); quantized PyTorch models are not supported yet")
    if hooked_by_nncf(model):
        raise SCAPError("the model is quantized or pruned by NNCF already; start from the model without")


def _why_not_prunable(module: nn.Module) -> str | None:
    if is_linear(module):
        return why_dense(module)
    return f"it is a {type(module).__name__}, not a fully connected layer with floating-point weights"


def _left_dense(model: nn.Module, forbidden: Mapping[nn.Module, str]) -> dict[str, str]:
    """Why layers cannot be pruned that otherwise would be, by path."""
    reasons: dict[str, str] = {}
    for path, module in saved_modules(model):
        reason = forbidden.get(module) if is_linear(module) else None
        reason = reason or why_dense(module)
        # Quantized layers of many a library are no nn.Linear, but as wide as one.
        if reason is None and not is_linear(module) and find_role(path) and hasattr(module, "in_features"):
            reason = f"a {type(module).__name__} is no fully connected layer with floating-point weights"
        if reason is not None:
            reasons[path] = reason
        # Where Mixtral and others hold the weights of all experts, whose roles the parameters' names tell.
        for name, value in module.named_parameters(path, recurse=False):
            if not is_lazy(value) and value.dim() >= 3 and find_role(name):
                reasons[name] = "experts of a mixture-of-experts model are not pruned yet"
    return reasons


def _first_of(reasons: Mapping[str, str]) -> str:
    return "".join(f"; {path}: {reason}" for path, reason in list(reasons.items())[:1])


def measure_sparsity(model: nn.Module, samples: Iterable[Any]) -> dict[str, float]:
    """The fraction of input channels that each pruned layer of `model` skips on `samples`, per module path.

    Every token counts alike, padding not at all; a layer that no token reaches is left out. Of a layer that is pruned
    in decode only, the fraction that decoding the same tokens one by one would prune.

    Raises:
        SCAPError: if there are no samples, or the model cannot run on one.
    """
    layers = pruned_layers(model)
    if not layers:
        return {}
    skipped = SkippedChannels()
    runner = _Runner(model, layers, samples)

    def count(path: str, module: Any) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = runner.without_padding(path, _input_of(args, kwargs))
            pruned = (x.float() - module.scap_mode).abs() <= module.scap_threshold
            channels = max(1, x.shape[-1])
            skipped.add(path, float(pruned.sum()) / channels, pruned.numel() // channels)

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [count(path, module) for path, module in layers.items()]
    try:
        with runner.inference():
            if run_over(samples, runner.forward, length(samples), "Sparsity") == 0:
                raise SCAPError("the dataset to measure sparsity on is empty")
    finally:
        for handle in handles:
            handle.remove()
    return skipped.fractions()


class _Runner:
    """Runs the model over the samples with thresholds in force and hands out what enters each site.

    A pruned activation takes the value of the mode, so that no bias has to be folded while the mode is not known.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], samples: Iterable[Any]) -> None:
        self._model = model
        self._layers = layers
        self._samples = samples
        self._total = length(samples)
        self._sites: list[Site] = []
        self._padding: _Padding | None = None
        self._options = _forward_options(model)
        self._names = input_names(model)
        config = getattr(model, "config", None)
        self._encoder_decoder = getattr(config, "is_encoder_decoder", None)
        self._pad_token = getattr(config, "pad_token_id", None)

    def find_sites(self, targets: Mapping[str, RoleTarget]) -> list[Site]:
        """Layers that read the same tensor with the same target share a site, as gate and up do."""
        seen: list[tuple[weakref.ref[Tensor], RoleTarget, list[str]]] = []

        def visit(path: str, x: Tensor) -> None:
            for reference, target, paths in seen:
                if reference() is x and target == targets[path]:
                    if path not in paths:
                        paths.append(path)
                    return
            if not any(path in paths for _, _, paths in seen):
                seen.append((weakref.ref(x), targets[path], [path]))

        with self.inference(), self._hooks({path: _record(visit, path) for path in self._layers}):
            first = next(iter(self._samples), None)
            if first is None:
                raise SCAPError("the calibration dataset is empty")
            self.forward(first)
        reached = {path for _, _, paths in seen for path in paths}
        for path in self._layers:
            # Another sample may still reach it; if none does, its statistics say so.
            if path not in reached:
                seen.append((weakref.ref(torch.empty(0)), targets[path], [path]))
        self._sites = [Site(paths[0], tuple(paths), target) for _, target, paths in seen]
        return self._sites

    def __call__(self, current: dict[str, Thresholding], fraction: float, description: str, visit: Visit) -> None:
        def prepare(site: Site, path: str) -> Any:
            thresholding = current[site.key]
            mode, threshold = float(thresholding.mode), float(thresholding.threshold)

            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                x = _input_of(args, kwargs)
                if path == site.key:
                    visit(site.key, self.without_padding(path, x))
                return None if thresholding is KEEP_ALL else ((prune(x, mode, threshold),), {})

            return hook

        limit = None if self._total is None else max(1, math.ceil(self._total * fraction))
        hooks = {path: prepare(site, path) for site in self._sites for path in site.layers}
        with self.inference(), self._hooks(hooks):
            if run_over(self._samples, self.forward, self._total, description, limit) == 0:
                raise SCAPError("the calibration dataset is empty")

    def forward(self, sample: Any) -> None:
        inputs = inputs_of(sample)
        self._padding = _Padding(self._by_name(inputs), self._encoder_decoder, self._pad_token)
        try:
            self._call(inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
            raise_interruption_behind(error)
            raise SCAPError(
                f"a {type(self._model).__name__} cannot run on the calibration sample {describe_sample(sample)}: "
                f"{first_line(error)}"
            ) from error

    def _by_name(self, inputs: dict[str, Any] | list[Any]) -> dict[str, Any]:
        return inputs if isinstance(inputs, dict) else dict(zip(self._names, inputs, strict=False))

    def _call(self, inputs: dict[str, Any] | list[Any]) -> None:
        device = _input_device(self._model)
        if isinstance(inputs, dict):
            options = {name: value for name, value in self._options.items() if name not in inputs}
            self._model(**{name: _to(value, device) for name, value in inputs.items()}, **options)
        else:
            self._model(*[_to(value, device) for value in inputs], **self._options)

    def without_padding(self, path: str, x: Tensor) -> Tensor:
        return x if self._padding is None else self._padding.remove_from(path, x)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode without gradients, and without torch.compile, whose code runs past new hooks.

        Every module's own mode is restored.
        """
        training = [module for module in self._model.modules() if module.training]
        self._model.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for module in training:
                module.training = True
            self._padding = None

    @contextmanager
    def _hooks(self, hooks: Mapping[str, Any]) -> Iterator[None]:
        handles = [
            self._layers[path].register_forward_pre_hook(hook, with_kwargs=True) for path, hook in hooks.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Padding(Padding):
    """The padding of one sample, and its removal from tensors on any device."""

    def __init__(self, inputs: Mapping[str, Any], encoder_decoder: bool | None, pad_token: int | None) -> None:
        super().__init__(inputs, encoder_decoder, pad_token)
        self._indices: dict[tuple[int, torch.device], Tensor] = {}

    def remove_from(self, path: str, x: Tensor) -> Tensor:
        """`[..., channels]` as it enters the layer `path`, to `[kept tokens, channels]` where there is padding."""
        rows = self.kept_rows(path, x.shape)
        if rows is None:
            return x
        key = (id(rows), x.device)
        if key not in self._indices:
            # Made on the host, they reach a GPU without synchronisation.
            self._indices[key] = torch.from_numpy(rows).to(x.device, non_blocking=True)
        return x.reshape(-1, x.shape[-1]).index_select(0, self._indices[key])


def _record(visit: Any, path: str) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        visit(path, _input_of(args, kwargs))

    return hook


def _input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The one argument that a fully connected layer is called with."""
    return next(iter((*args, *kwargs.values())))


def find_modules(model: nn.Module, paths: Iterable[str]) -> dict[str, list[nn.Module]]:
    """The modules called `paths`, also where a head has been added to, or taken from, the model that was calibrated.

    One module each, but for the copies that adapters bring.

    Raises:
        SCAPError: naming a path that the model does not have.
    """
    model = unwrap(model)
    prefix = getattr(model, "base_model_prefix", "")
    by_path: dict[str, list[nn.Module]] = {}
    for path, module in saved_modules(model):
        by_path.setdefault(path, []).append(module)
    found = {}
    for path in paths:
        bare = module_path(path)  # without what DataParallel, torch.compile and PEFT put around it
        candidates = [path, bare]
        if prefix:
            candidates.append(bare.removeprefix(f"{prefix}.") if bare.startswith(f"{prefix}.") else f"{prefix}.{bare}")
        name = next((candidate for candidate in candidates if candidate in by_path), None)
        if name is None:
            raise SCAPError(f"layer {path} does not exist in the model, a {type(model).__name__}")
        found[path] = by_path[name]
    return found


def _attach(model: nn.Module, parameters: SCAPParameters) -> None:
    model._scap_parameters = parameters  # type: ignore[assignment]
    if is_from_transformers(model):
        from .quantizer import attach_quantizer

        attach_quantizer(model, parameters)


def _forward_options(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that spare a calibration what it does not need: a cache, and logits of every token."""
    try:
        names = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}
    options = {"use_cache": False, "logits_to_keep": 1}
    return {name: value for name, value in options.items() if name in names and hasattr(model, "config")}


def input_names(model: nn.Module) -> list[str]:
    """The names of the inputs that `model` takes, in order; empty if it does not tell."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


def _input_device(model: nn.Module) -> torch.device | None:
    """Where the inputs belong; None where accelerate moves them itself."""
    if hasattr(model, "_hf_hook"):
        return None
    device = next((tensor.device for tensor in model.parameters()), None)
    return None if device is None or device.type == "meta" else device


def _to(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor) and device is not None:
        return value.to(device, non_blocking=True)
    return value
