"""Layers over one input as one SCAPLinear: pruned ones, and dense ones of 4-bit weights."""

import logging
from collections.abc import Collection, Iterable

import openvino as ov

from ..extension.nodes import create_linear
from ..graph import FullyConnected, find_fully_connected, group_by_input
from ..threshold_ops import match_threshold_ops
from ..weights import is_int4
from .layer import Group, Workshop, output_and_bias, redirect


logger = logging.getLogger(__name__)


def fuse_linear_layers(groups: list[Group], workshop: Workshop) -> tuple[list[str], list[Group]]:
    """See `layer.BlockKind`. Takes every group."""
    for group in groups:
        ops = group[0].ops
        node = create_linear(
            ops.source,
            [layer.packed for layer in group],
            mode=float(ops.criterion.mode),
            threshold=float(ops.criterion.threshold),
            scale=ops.criterion.scale,
            decode_only=ops.decode_only,
            **workshop.options,
        )
        node.set_friendly_name(f"{ops.layer.path}/scap/SCAPLinear")
        for index, layer in enumerate(group):
            redirect(layer.output, node.output(index))
    return [layer.path for group in groups for layer in group], []


def find_dense_int4(model: ov.Model, among: Collection[str] | None) -> list[FullyConnected]:
    """The dense layers of 4-bit weights that the operation can take the place of.

    Args:
        model: the model.
        among: the module paths of layers that may be replaced; None for all.
    """
    return [
        layer
        for layer in find_fully_connected(model)
        if (among is None or layer.path in among)
        and {layer.activations.get_element_type(), layer.node.get_output_element_type(0)} == {ov.Type.f32}
        and not layer.quantizers
        and match_threshold_ops(layer) is None
        and is_int4(layer)
    ]


def fuse_dense_int4(layers: Iterable[FullyConnected], workshop: Workshop) -> list[str]:
    """Puts the operation, with a threshold of 0, in the place of dense layers of 4-bit weights, in their model.

    Returns:
        The module paths of the layers that were replaced.
    """
    fused = []
    for group in group_by_input(layers):
        outputs, packed = [], []
        try:
            for layer in group:
                output, bias = output_and_bias(layer)
                outputs.append(output)
                packed.append(workshop.pack(layer, bias))
        except ValueError as reason:
            logger.debug("%s keeps the stock operation: %s", layer.path, reason)
            continue
        node = create_linear(group[0].activations, packed, **workshop.options)
        node.set_friendly_name(f"{group[0].path}/SCAPLinear")
        for index, output in enumerate(outputs):
            redirect(output, node.output(index))
        fused += [layer.path for layer in group]
    return fused
