"""`operation`, over integer weights. Needs no vLLM."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..torch.dispatch import MAX_SPARSE_ROWS
from ..torch.kernels import library
from ..torch.weights import Weights
from .operation import Biases, Part, joined, multiply_parts, part_of, row_count, spans_of


def served_integer_linear(
    x: Tensor,
    weights: Sequence[Weights],
    biases: Biases,
    parts: Sequence[Part],
    decode_only: bool,
    sparse_rows: int = MAX_SPARSE_ROWS,
) -> Tensor:
    """A layer whose input is pruned or not, for any number of rows.

    Args:
        x: `[rows, in_features]`.
        weights: of each part, all in one format, with groups of one size and one kind of zero points.
        biases: from `operation.fold_sums`.
        parts: of the outputs.
        decode_only: whether more than 8 rows are left dense.
        sparse_rows: up to so many rows run the sparse operation, at most 8.

    Returns:
        `[rows, out_features]`.
    """
    tensors = [tensor for layer in weights for tensor in layer.tensors]
    sizes, thresholds, modes, scales = (list(values) for values in zip(*parts, strict=True))
    return _operation(
        x, tensors, weights[0].format, *biases, sizes, thresholds, modes, scales, decode_only, sparse_rows
    )


def kind(weights: Weights) -> tuple[object, ...]:
    """What the weights of the parts of one operation have in common."""
    _, scales, zero_points = weights.tensors
    return weights.format, scales.shape[0], scales.dtype, zero_points.dtype, zero_points.numel() > 0


def _served_integer_linear(
    x: Tensor,
    tensors: Sequence[Tensor],
    format: str,
    dense_bias: Tensor | None,
    pruned_bias: Tensor | None,
    sparse_bias: Tensor | None,
    sizes: Sequence[int],
    thresholds: Sequence[float],
    modes: Sequence[float],
    scales: Sequence[Tensor | None],
    decode_only: bool,
    sparse_rows: int,
) -> Tensor:
    if 1 == row_count(x) <= sparse_rows and all(threshold < 0 for threshold in thresholds):
        added = [part_of(sparse_bias, span) for span in spans_of(sizes)]
        return joined(library.linear_group(x, tensors, format, added))
    biases = Biases(dense_bias, pruned_bias, sparse_bias)
    return multiply_parts(x, tensors, format, biases, sizes, thresholds, modes, scales, decode_only, sparse_rows)


_library = torch.library.Library(library.NAMESPACE, "FRAGMENT")
_library.define(
    "served_integer_linear(Tensor x, Tensor[] tensors, str format, Tensor? dense_bias, Tensor? pruned_bias, "
    "Tensor? sparse_bias, int[] sizes, float[] thresholds, float[] modes, Tensor?[] scales, bool decode_only, "
    "int sparse_rows) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_library.impl("served_integer_linear", _served_integer_linear, "CompositeExplicitAutograd")
torch.library.register_fake(
    f"{library.NAMESPACE}::served_integer_linear",
    lambda x, tensors, format, dense, pruned, sparse, sizes, *_: x.new_empty((*x.shape[:-1], sum(sizes))),
    lib=_library,
)
_operation = torch.ops.optimum_scap.served_integer_linear.default
