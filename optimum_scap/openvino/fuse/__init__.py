"""Replaces threshold operations and the fully connected layers behind them by the C++ sparse operations.

Ours and NNCF's threshold operations are recognized. Layers that share their thresholded input become one `SCAPLinear`;
a whole FFN, `down(act(gate(x)) * up(x))` or `down(act(up(x)))`, becomes one `SCAPFeedForward`. A layer whose weights
the operations cannot read keeps the stock ones. Layers of 4-bit weights that are not pruned may become `SCAPLinear`
too, with a threshold of 0: it reads them faster than OpenVINO's own operation.

A further kind of block (experts) is a file beside `ffn` and `linear`, and its entry in KINDS.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import openvino as ov

from ...core.config import DenseLayers
from ...core.parameters import SCAPParameters
from ...errors import SCAPError
from ..extension.build import build_extension
from ..extension.nodes import OPSET
from ..extension.packing import BufferPool, is_fast_for_dense_int4
from ..graph import FullyConnected, group_by_input
from ..mapped_files import MappedFiles
from ..parameters import read_parameters
from ..threshold_ops import find_threshold_ops, match_threshold_ops
from ..weights import is_integer
from .ffn import fuse_feed_forwards
from .layer import BlockKind, FusedLayer, Workshop, prepare
from .linear import find_dense_layers, fuse_dense_layers, fuse_linear_layers


__all__ = ["FusionReport", "fuse", "is_operation", "replaces_dense_layers", "set_attributes"]

logger = logging.getLogger(__name__)

# FFNs first: they are made of groups that are layers over one input, too.
KINDS: tuple[BlockKind, ...] = (fuse_feed_forwards, fuse_linear_layers)


@dataclass
class FusionReport:
    """Module paths of the sparse layers that were fused, of those that were not with the reason, and of dense ones."""

    fused: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)


def fuse(
    model: ov.Model,
    *,
    precision: str = "split",
    activation_group_size: int = 0,
    library: Path | None = None,
    dense_int4: bool | None = None,
    dense_layers: DenseLayers | None = None,
) -> FusionReport:
    """Fuses every sparse layer of `model` in place.

    Args:
        model: a model with threshold operations; one without is left as it is.
        precision, activation_group_size: how the operations compute, see `extension.nodes.create_linear`.
        library: the compiled extension; by default it is built or found in the cache.
        dense_int4: whether layers of 4-bit weights that are not pruned use the operation too; by default where that is
            faster: in models that generate token by token, on CPUs with AVX-512 VNNI, unless f32 is asked for. A model
            without threshold operations stays as it is.
        dense_layers: which layers that may be, see SCAPConfig; by default what the model's parameters say.

    Raises:
        ExtensionBuildError: if the extension cannot be built.
    """
    report = FusionReport()
    found_ops = find_threshold_ops(model)
    if not found_ops:
        return report
    # Finding the library asks the compiler for its version: once for a model, not once for every node.
    workshop = Workshop(library or build_extension(), precision, BufferPool(), MappedFiles(), activation_group_size)
    ready: dict[str, FusedLayer] = {}
    for ops in found_ops:
        try:
            ready[ops.layer.node.get_name()] = prepare(ops, workshop)
        except ValueError as reason:
            report.kept[ops.layer.path] = str(reason)
            logger.debug("%s keeps the stock operations: %s", ops.layer.path, reason)
    layers = group_by_input(layer.ops.layer for layer in ready.values())
    groups = [[ready[layer.node.get_name()] for layer in group] for group in layers]
    for fuse_blocks in KINDS:
        fused, groups = fuse_blocks(groups, workshop)
        report.fused += fused
    if dense_int4 is None:
        dense_int4 = _is_faster_for_dense_int4(model, precision, workshop.library)
    if dense_int4:
        report.dense = fuse_dense_layers(_dense_int4_layers(model, dense_layers), workshop)
    model.validate_nodes_and_infer_types()
    return report


def replaces_dense_layers(model: ov.Model, *, precision: str, library: Path) -> bool:
    """Whether `fuse` with these arguments would replace layers of `model` that are not pruned; changes nothing."""
    if not find_threshold_ops(model) or not _is_faster_for_dense_int4(model, precision, library):
        return False
    return bool(_dense_int4_layers(model, None))


def _is_faster_for_dense_int4(model: ov.Model, precision: str, library: Path) -> bool:
    return precision != "f32" and _generates(model) and is_fast_for_dense_int4(library)


def _dense_int4_layers(model: ov.Model, dense_layers: DenseLayers | None) -> list[FullyConnected]:
    """The layers of 4-bit weights that are not pruned and may be replaced."""
    parameters = _parameters(model)
    dense_layers = dense_layers or (parameters.dense_layers if parameters is not None else "fast")
    if dense_layers == "stock":
        return []
    sites = None if parameters is None or dense_layers == "all" else parameters.sites
    among = None if sites is None else {path for site in sites for path in site}

    def accepts(layer: FullyConnected) -> bool:
        named = among is None or layer.path in among
        return named and match_threshold_ops(layer) is None and is_integer(layer, (4,))

    return find_dense_layers(model, accepts)


def _parameters(model: ov.Model) -> SCAPParameters | None:
    """What `model` says about itself; it runs without, too."""
    try:
        return read_parameters(model)
    except SCAPError as error:
        logger.warning("%s", error)
        return None


def is_operation(node: ov.Node) -> bool:
    """Whether `node` is one of the C++ operations."""
    return node.get_type_info().version_id == OPSET


def set_attributes(model: ov.Model, attributes: Mapping[str, str]) -> None:
    """Has the C++ operations that `model` holds compute in another way, in place.

    Raises:
        RuntimeError: an attribute that the operations do not have, or a value that it does not take.
    """
    for node in model.get_ops():
        if is_operation(node):
            for name, value in attributes.items():
                node.set_attribute(name, value)
    model.validate_nodes_and_infer_types()


def _generates(model: ov.Model) -> bool:
    """Whether `model` keeps what it computed for earlier tokens."""
    names = (name for port in model.inputs for name in port.get_names())
    return bool(model.get_sinks()) or any(name.startswith(("past_key_values", "cache_params")) for name in names)
