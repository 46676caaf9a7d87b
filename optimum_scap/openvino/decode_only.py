"""The threshold of a layer that is pruned in decoding alone, chosen by the shape of the activations x while it runs.

    Select(tokens == 1 and sequences <= 8, t, 0)        tokens, sequences: x is [sequences, tokens, channels]

Paged attention (openvino_genai's continuous batching) hands each token to the layers as a sequence of its own: there
the number of tokens in a step decides, whatever they belong to. Two-dimensional activations are pruned one at a time.
"""

import numpy as np
import openvino as ov
from openvino import opset13 as opset

from ..core.config import MOST_DECODED_SEQUENCES
from .graph import evaluate_constant, is_constant


_CHANGES_NO_VALUE = ("Convert", "ConvertLike", "Squeeze", "Unsqueeze", "Reshape")


def threshold_in_decode(source: ov.Output, threshold: ov.Node, *, is_scaled: bool) -> ov.Node:
    """The threshold for `source`, of two dimensions or more: `threshold` in decoding, else one that prunes nothing."""
    rank = source.get_partial_shape().rank.get_length()
    shape = opset.shape_of(source)
    decodes = opset.equal(_dimensions(shape, [rank - 2]), opset.constant(1))
    if rank > 2:
        few = opset.less_equal(_dimensions(shape, list(range(rank - 2))), opset.constant(MOST_DECODED_SEQUENCES))
        decodes = opset.logical_and(decodes, few)
    # A threshold of 0 prunes what would add nothing; with a scale of 0 in it, a score of 0 may stand for more.
    nothing = opset.constant(np.float32(-1.0 if is_scaled else 0.0))
    return opset.select(decodes, threshold, nothing)


def _dimensions(shape: ov.Node, places: list[int]) -> ov.Node:
    """The product of dimensions, a scalar."""
    if len(places) == 1:
        return opset.gather(shape, opset.constant(places[0]), opset.constant(0))
    return opset.reduce_prod(opset.gather(shape, opset.constant(places), opset.constant(0)), opset.constant(0))


def match_threshold_in_decode(threshold: ov.Output, centered: ov.Output) -> tuple[ov.Output, ov.Node] | None:
    """t and the ShapeOf, if `threshold` is what `threshold_in_decode` makes, or an export of a PyTorch layer.

    Args:
        threshold: what the scores are compared with.
        centered: x - m, or x.
    """
    select = _value(threshold).get_node()
    if select.get_type_name() != "Select":
        return None
    condition, in_decode, otherwise = (_value(value) for value in select.input_values())
    if not is_constant(in_decode) or not is_constant(otherwise) or evaluate_constant(otherwise).item() > 0:
        return None
    tests = [condition]
    if condition.get_node().get_type_name() in ("LogicalAnd", "BitwiseAnd"):
        tests = [_value(value) for value in condition.get_node().input_values()]
    one = [test.get_node() for test in tests if test.get_node().get_type_name() == "Equal"]
    few = [test.get_node() for test in tests if test.get_node().get_type_name() == "LessEqual"]
    if len(one) != 1 or len(few) != len(tests) - 1:
        return None
    if not all(_compares_with(test, MOST_DECODED_SEQUENCES) for test in few):
        return None
    gather = _value(one[0].input_value(0)).get_node()
    if gather.get_type_name() != "Gather" or not _compares_with(one[0], 1):
        return None
    index = gather.input_value(1)
    shape_of = _value(gather.input_value(0)).get_node()
    if shape_of.get_type_name() != "ShapeOf" or not is_constant(index):
        return None
    # x and x - m have one shape; which of them is asked does not matter.
    asked, subtract = shape_of.input_value(0), centered.get_node()
    own = same_output(asked, centered) or (bool(subtract.inputs()) and same_output(asked, subtract.input_value(0)))
    rank = centered.get_partial_shape().rank.get_length()
    is_tokens = int(evaluate_constant(index).item()) in (rank - 2, -2)
    return (in_decode, shape_of) if own and is_tokens else None


def same_output(a: ov.Output, b: ov.Output) -> bool:
    """Whether both are one output of one node."""
    return a.get_node().get_name() == b.get_node().get_name() and a.get_index() == b.get_index()


def _compares_with(node: ov.Node, number: int) -> bool:
    limit = _value(node.input_value(1))
    return is_constant(limit) and evaluate_constant(limit).item() == number


def _value(value: ov.Output) -> ov.Output:
    """What `value` is made of, without changes of type and of the number of dimensions."""
    while value.get_node().get_type_name() in _CHANGES_NO_VALUE:
        value = value.get_node().input_value(0)
    return value
