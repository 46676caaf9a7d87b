"""Layers over one input as one SCAPLinear: pruned ones, and dense ones."""

import logging
from collections.abc import Callable, Iterable

import openvino as ov

from ..extension.nodes import create_linear
from ..graph import FullyConnected, find_fully_connected, group_by_input
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


def find_dense_layers(model: ov.Model, accepts: Callable[[FullyConnected], bool]) -> list[FullyConnected]:
    """The fully connected layers that the operation can take the place of, as far as their types go.

    Args:
        model: the model.
        accepts: which of them are asked for.
    """
    return [
        layer
        for layer in find_fully_connected(model)
        if {layer.activations.get_element_type(), layer.node.get_output_element_type(0)} == {ov.Type.f32}
        and not layer.quantizers
        and accepts(layer)
    ]


def fuse_dense_layers(layers: Iterable[FullyConnected], workshop: Workshop) -> list[str]:
    """Puts the operation, with a threshold of 0, in the place of fully connected layers, in their model.

    Returns:
        The module paths of the layers that were replaced; those whose weights it cannot read stay.
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
