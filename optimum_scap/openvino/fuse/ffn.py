"""A whole feed-forward network, `down(act(gate(x)) * up(x))` or `down(act(up(x)))`, as one SCAPFeedForward."""

import openvino as ov

from ..extension.nodes import create_feed_forward
from ..graph import evaluate_constant, is_constant
from .layer import FusedLayer, Group, Workshop, redirect


def fuse_feed_forwards(groups: list[Group], workshop: Workshop) -> tuple[list[str], list[Group]]:
    """See `layer.BlockKind`. Takes two groups each: the one of up (and gate) and the one of down."""
    fused: list[str] = []
    for group in list(groups):
        found = _find_feed_forward(group, groups)
        if found is None:
            continue
        projections, activation = found
        (down,) = group
        _replace_feed_forward(projections, down, activation, workshop)
        fused += [layer.path for layer in (*projections, down)]
        taken = {layer.output.get_node().get_name() for layer in (*projections, down)}
        groups = [other for other in groups if other[0].output.get_node().get_name() not in taken]
    return fused, groups


def _find_feed_forward(group: Group, groups: list[Group]) -> tuple[Group, str] | None:
    """The layers (gate and up, or up) and the activation in front of `group`, if it is the `down` of an FFN."""
    if len(group) != 1:
        return None
    down = group[0].ops
    hidden = down.source.get_node()
    if any(reader.get_node().get_name() not in down.nodes for reader in hidden.output(0).get_target_inputs()):
        return None
    if hidden.get_type_name() == "Multiply":
        for activated, linear in (hidden.input_values(), reversed(hidden.input_values())):
            activation = _activation(activated.get_node())
            if activation is None or not _read_once(activated) or not _read_once(linear):
                continue
            source = activated.get_node().input_value(0)
            projections = _layers_with_outputs((source, linear), groups, down.decode_only)
            if projections is not None and _read_once(source):
                return projections, activation
    activation = _activation(hidden)
    if activation is not None:
        source = hidden.input_value(0)
        projections = _layers_with_outputs((source,), groups, down.decode_only)
        if projections is not None and _read_once(source):
            return projections, activation
    return None


def _layers_with_outputs(outputs: tuple[ov.Output, ...], groups: list[Group], decode_only: bool) -> Group | None:
    """The layers that make up one group and have exactly these outputs, in this order."""
    for group in groups:
        if group[0].ops.decode_only != decode_only:
            continue
        by_name = {layer.output.get_node().get_name(): layer for layer in group}
        names = [output.get_node().get_name() for output in outputs]
        if len(group) == len(outputs) == len(set(names)) and all(name in by_name for name in names):
            return [by_name[name] for name in names]
    return None


def _activation(node: ov.Node) -> str | None:
    kind = node.get_type_name()
    if kind == "Swish":
        beta = node.input_values()[1:]
        is_silu = not beta or (is_constant(beta[0]) and evaluate_constant(beta[0]).item() == 1)
        return "silu" if is_silu else None
    if kind == "Gelu":
        return {"ERF": "gelu_erf", "TANH": "gelu_tanh"}.get(str(node.get_attributes()["approximation_mode"]).upper())
    return "relu" if kind == "Relu" else None


def _replace_feed_forward(projections: Group, down: FusedLayer, activation: str, workshop: Workshop) -> None:
    ops = projections[0].ops
    node = create_feed_forward(
        ops.source,
        [layer.packed for layer in (*projections, down)],
        activation,
        mode=float(ops.criterion.mode),
        threshold=float(ops.criterion.threshold),
        scale=ops.criterion.scale,
        decode_only=ops.decode_only,
        hidden_mode=float(down.ops.criterion.mode),
        hidden_threshold=float(down.ops.criterion.threshold),
        hidden_scale=down.ops.criterion.scale,
        **workshop.options,
    )
    node.set_friendly_name(f"{down.path}/scap/SCAPFeedForward")
    redirect(down.output, node.output(0))


def _read_once(output: ov.Output) -> bool:
    return len(output.get_target_inputs()) == 1
