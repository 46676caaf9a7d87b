"""SCAP on an `ov.Model`: collect statistics on the IR itself, insert the threshold operations, keep the parameters."""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as opset

from .. import __version__
from ..core.calibration import (
    Site,
    Thresholding,
    Visit,
    calibrate,
    check_patterns,
    select_targets,
)
from ..core.config import RoleTarget, SCAPConfig
from ..core.measuring import SkippedChannels
from ..core.parameters import LayerParameters, SCAPParameters, parameters_from_json
from ..core.roles import ROLES, module_path
from ..data.padding import Padding
from ..errors import SCAPError, printable
from ..progress import length, run_over
from .graph import FullyConnected, find_fully_connected
from .inference import Runner, model_with_outputs
from .threshold_ops import ThresholdOps, find_threshold_ops, insert_adjustable_ops, insert_threshold_ops


logger = logging.getLogger(__name__)

_RT_INFO = ["optimum_scap", "parameters"]


def sparsify_models(
    models: Mapping[str, ov.Model], config: SCAPConfig, samples: Mapping[str, Iterable[Any]]
) -> SCAPParameters:
    """Calibrates SCAP on one or several models that work together and inserts the threshold operations in place.

    Args:
        models: the models by name, uncompressed or with weights compressed by NNCF (an encoder-decoder has two). None
            of them is touched until all are calibrated.
        config: what to prune.
        samples: inputs per model name (dicts by input name, or the inputs in order); iterated several times. A model
            without samples stays dense.

    Returns:
        The parameters of all pruned layers. Every changed model carries its own, see `read_parameters`.

    Raises:
        SCAPError: if a model is sparse already, nothing matches the config, or calibration is impossible.
    """
    layers = check_models(models, config)
    found: dict[str, dict[Site, Thresholding]] = {}
    for name, model in models.items():
        sites = _sites(layers[name], config)
        if sites and name in samples:
            thresholdings = calibrate(sites, _Collector(model, sites, samples[name]), config.seed)
            found[name] = {site: thresholdings[site.key] for site in sites}
    if not found:
        raise SCAPError("the calibration dataset has no samples for any model that holds layers to prune")

    everything: dict[str, LayerParameters] = {}
    for name, thresholds in found.items():
        own = _parameters(layers[name], thresholds)
        everything.update(own)
        _insert(models[name], layers[name], SCAPParameters(version=__version__, config=config, layers=own))
    return SCAPParameters(version=__version__, config=config, layers=everything)


def apply_parameters(models: Mapping[str, ov.Model], parameters: SCAPParameters) -> None:
    """Inserts the threshold operations for parameters that are known, without calibration, in place.

    Raises:
        SCAPError: if a model is sparse already or none of them has a layer that `parameters` name; nothing is changed.
    """
    layers = _layers_of_dense_models(models)
    missing = [path for path in parameters.layers if not any(path in named for named in layers.values())]
    if missing:
        known = next(iter(next(named for named in layers.values() if named)))
        raise SCAPError(
            f"layer {printable(missing[0])} does not exist in the model (nor do {len(missing) - 1} others of "
            f"{len(parameters.layers)}); the model has, for example, {known}"
        )
    for name, named in layers.items():
        own = {path: layer for path, layer in parameters.layers.items() if path in named}
        if own:
            _insert(models[name], named, parameters.model_copy(update={"layers": own}))


def _insert(model: ov.Model, layers: Mapping[str, FullyConnected], parameters: SCAPParameters) -> None:
    """Layers that read the same activations with the same mode and threshold share the operations."""
    shared: dict[tuple[str, int, float, float], list[FullyConnected]] = {}
    for path, layer in parameters.layers.items():
        source = layers[path].node.input_value(0)
        key = (source.get_node().get_name(), source.get_index(), layer.mode, layer.threshold)
        shared.setdefault(key, []).append(layers[path])
    for (_, _, mode, threshold), group in shared.items():
        thresholding = Thresholding(np.float32(mode), np.float32(threshold))
        insert_threshold_ops(group, thresholding, decode_only=parameters.config.apply_to == "decode")
    model.validate_nodes_and_infer_types()
    model.set_rt_info(parameters.model_dump_json(), _RT_INFO)


def check_models(models: Mapping[str, ov.Model], config: SCAPConfig) -> dict[str, dict[str, FullyConnected]]:
    """Checks, before any calibration data is made, that `config` can be applied to `models`.

    Returns:
        The fully connected layers by module path, per model.

    Raises:
        SCAPError: if a model is sparse already, or nothing in any of them matches the config.
    """
    layers = _layers_of_dense_models(models)
    everything = {path: layer for named in layers.values() for path, layer in named.items()}
    check_patterns(everything, config)
    present = {layer.role for layer in everything.values() if layer.role}
    has_experts = any(
        ".experts" in node.get_friendly_name() and module_path(node.get_friendly_name()) not in everything
        for model in models.values()
        for node in model.get_ops()
        if node.get_type_name() == "MatMul"
    )
    if not select_targets([(path, layer.role) for path, layer in everything.items()], config):
        raise SCAPError(
            f"no fully connected layer is left to prune: the targets name {', '.join(config.targets)}, the model has "
            f"{', '.join(role for role in ROLES if role in present) or 'no layer of a known role'}"
            f"{'; experts of a mixture-of-experts model are not pruned yet' if has_experts else ''}"
        )
    if has_experts:
        logger.warning("The experts of this mixture-of-experts model stay dense: they are not pruned yet")
    for role in config.targets:
        if role not in present:
            logger.info("the model has no layer of role %s", role)
    return layers


def _layers_of_dense_models(models: Mapping[str, ov.Model]) -> dict[str, dict[str, FullyConnected]]:
    for name, model in models.items():
        if model.has_rt_info(_RT_INFO) or find_threshold_ops(model):
            raise SCAPError(f"{name} already holds SCAP threshold operations; start from the model without them")
    layers = {name: {layer.path: layer for layer in named_layers(model)} for name, model in models.items()}
    if not any(layers.values()):
        raise SCAPError("the model has no fully connected layer (a MatMul with constant 2-D weights) to prune")
    return layers


def _parameters(
    layers: Mapping[str, FullyConnected], thresholds: Mapping[Site, Thresholding]
) -> dict[str, LayerParameters]:
    by_path = {path: (site, thresholding) for site, thresholding in thresholds.items() for path in site.layers}
    return {
        path: LayerParameters(
            role=layer.role,
            method=by_path[path][0].target.mode,
            target_sparsity=by_path[path][0].target.sparsity,
            mode=float(by_path[path][1].mode),
            threshold=float(by_path[path][1].threshold),
        )
        for path, layer in layers.items()
        if path in by_path and layer.role is not None
    }


def read_parameters(model: ov.Model) -> SCAPParameters | None:
    """The SCAP parameters that `model` carries, None if it carries none.

    Raises:
        SCAPError: if what it carries cannot be read.
    """
    if not model.has_rt_info(_RT_INFO):
        return None
    return parameters_from_json(model.get_rt_info(_RT_INFO).astype(str), "the model's SCAP parameters")


def measure_sparsity(model: ov.Model, samples: Iterable[Any], total: int | None = None) -> dict[str, float]:
    """The fraction of input channels that each pruned layer of `model` skips on `samples`, per module path.

    Every token counts alike, padding not at all; a layer that no token reaches is left out. Of a layer that is pruned
    in decode only, the fraction that decoding the same tokens one by one would prune.

    Raises:
        SCAPError: if there are no samples, or the model cannot run on one.
    """
    ops = find_threshold_ops(clone := model.clone())
    if not ops:
        return {}
    run = Runner(model_with_outputs(clone, [_pruned_by_token(match) for match in ops]))
    skipped = SkippedChannels()

    def measure(sample: Any) -> None:
        inputs = run.inputs_by_name(sample)
        padding = Padding(inputs)
        for match, by_token in zip(ops, run(inputs), strict=True):
            rows = padding.kept_rows(match.layer.path, (*by_token.shape, match.layer.in_features))
            values = by_token.reshape(-1) if rows is None else by_token.reshape(-1)[rows]
            skipped.add(match.layer.path, float(values.sum(dtype=np.float64)), values.size)

    if run_over(samples, measure, total, "Sparsity") == 0:
        raise SCAPError("the dataset to measure sparsity on is empty")
    return skipped.fractions()


def _pruned_by_token(match: ThresholdOps) -> ov.Output:
    """The fraction of input channels that is pruned of each token: `[...]` for activations `[..., channels]`."""
    magnitude = match.mask.get_node().input_value(0)
    pruned = opset.convert(opset.less_equal(magnitude, opset.constant(np.float32(match.threshold))), "f32")
    return opset.reduce_mean(pruned, opset.constant(np.array([-1], dtype=np.int64))).output(0)


def named_layers(model: ov.Model) -> list[FullyConnected]:
    """The fully connected layers of `model`; where several share a module path, only the first one has it.

    The others (the low-rank branches of NNCF's LoRA correction, a layer that is called twice) stay dense.
    """
    named: dict[str, FullyConnected] = {}
    for layer in find_fully_connected(model):
        named.setdefault(layer.path, layer)
    return list(named.values())


def _sites(layers: Mapping[str, FullyConnected], config: SCAPConfig) -> list[Site]:
    """Layers that read the same activations with the same target share a site, as gate and up do."""
    grouped: dict[tuple[str, int, RoleTarget], list[str]] = {}
    for path, target in select_targets([(path, layer.role) for path, layer in layers.items()], config).items():
        source = layers[path].node.input_value(0)
        grouped.setdefault((source.get_node().get_name(), source.get_index(), target), []).append(path)
    return [Site(paths[0], tuple(paths), target) for (_, _, target), paths in grouped.items()]


class _Collector:
    """Runs the model over the samples with thresholds that can be changed between passes without recompiling.

    In a clone of the model every site becomes `Select(|x - m| <= t, m, x)` with m and t as model inputs; what is
    pruned takes the value m itself, so that no bias has to be folded while m is not known.
    """

    def __init__(self, model: ov.Model, sites: list[Site], samples: Iterable[Any]) -> None:
        self._sites = sites
        self._samples = samples
        self._total = length(samples)
        clone = model.clone()
        layers = {layer.path: layer for layer in named_layers(clone)}
        parameters, outputs = [], []
        for index, site in enumerate(sites):
            mode, threshold = (_scalar_parameter(_input_name(index, name)) for name in ("mode", "threshold"))
            first = layers[site.layers[0]]
            outputs.append(first.activations)
            insert_adjustable_ops([layers[path] for path in site.layers], mode, threshold)
            parameters += [mode, threshold]
        self._run = Runner(model_with_outputs(clone, outputs, parameters))

    def __call__(self, current: dict[str, Thresholding], fraction: float, description: str, visit: Visit) -> None:
        inputs = {}
        for index, site in enumerate(self._sites):
            inputs[_input_name(index, "mode")] = np.array(current[site.key].mode)
            inputs[_input_name(index, "threshold")] = np.array(current[site.key].threshold)
        self._run.set_fixed_inputs(inputs)

        def collect(sample: Any) -> None:
            named = self._run.inputs_by_name(sample)
            padding = Padding(named)
            for site, activations in zip(self._sites, self._run(named), strict=True):
                rows = padding.kept_rows(site.layers[0], activations.shape)
                visit(site.key, activations if rows is None else activations.reshape(-1, activations.shape[-1])[rows])

        limit = None if self._total is None else max(1, math.ceil(self._total * fraction))
        if run_over(self._samples, collect, self._total, description, limit) == 0:
            raise SCAPError("the calibration dataset is empty")


def _scalar_parameter(name: str) -> ov.Node:
    parameter = opset.parameter([], np.float32, name=name)
    parameter.output(0).set_names({name})
    return parameter


def _input_name(index: int, what: str) -> str:
    return f"scap.{index}.{what}"
