"""The layer as vLLM runs it: one torch operation, which looks at the number of rows when it runs. Needs no vLLM.

vLLM compiles a model for any number of rows and drops the guards of the compiler, so that a branch outside of an
operation would be taken as it was at first. A captured graph has a fixed number of rows, some of them padding, which
are pruned by the same rule as others: they can only have more channels read.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.config import MOST_DECODED_SEQUENCES
from ..torch.kernels import library
from ..torch.weights import find_format


# Up to so many rows the sparse operation is faster than products of the pruned input, one for each criterion
# (examples/benchmarks/gpu_serving.py, with rows drawn independently of each other).
SPARSE_ROWS = 2
SPARSE_ROWS_OF_SEVERAL_CRITERIA = 4

# Below every distance: a part with this threshold is dense.
KEEPS_ALL = -1.0


class Part(NamedTuple):
    """Neighboring outputs of a layer with one criterion, see `core.criterion`.

    Args:
        size: how many outputs.
        threshold, mode: of the criterion.
        scale: of the criterion, `[in_features]`, float32, or None.
    """

    size: int
    threshold: float = KEEPS_ALL
    mode: float = 0.0
    scale: Tensor | None = None


class Biases(NamedTuple):
    """What is added to a product, `[out_features]` or None, by the way that a forward takes.

    Args:
        dense: the layer's bias, where nothing is pruned.
        pruned: with the correction, where the mode stands in place of what is pruned.
        sparse: with correction and m * W·1, where kept channels alone are read; float32 if it is more than the bias.
    """

    dense: Tensor | None
    pruned: Tensor | None
    sparse: Tensor | None


def merged(parts: Sequence[Part]) -> list[Part]:
    """Neighbors with the same criterion as one part: q, k and v that share thresholds are one product."""
    found: list[Part] = []
    for part in parts:
        if found and _same_criterion(found[-1], part):
            found[-1] = found[-1]._replace(size=found[-1].size + part.size)
        else:
            found.append(part)
    return found


def _same_criterion(first: Part, second: Part) -> bool:
    if first[1:3] != second[1:3] or (first.scale is None) != (second.scale is None):
        return False
    return first.scale is None or second.scale is None or torch.equal(first.scale, second.scale)


def fold(weight: Tensor, parts: Sequence[Part], bias: Tensor | None, correction: Tensor | None) -> Biases:
    """The biases of a layer, or of a rank's shard of one, whose own sums over its weights are what the mode needs.

    Args:
        weight: `[out_features, in_features]` of this rank.
        parts: of the outputs.
        bias, correction: `[out_features]`; of a layer whose outputs are summed over ranks, None on all but one.
    """
    return fold_sums(lambda: weight.sum(dim=1, dtype=torch.float32), weight.dtype, parts, bias, correction)


def fold_sums(
    row_sums: Callable[[], Tensor],
    dtype: torch.dtype,
    parts: Sequence[Part],
    bias: Tensor | None,
    correction: Tensor | None,
) -> Biases:
    """`fold`, of weights that are no matrix: `row_sums` gives W·1 in float32, `dtype` is that of the activations."""
    pruned = bias
    if correction is not None:
        pruned = correction.to(dtype) if bias is None else bias + correction.to(dtype)
    if all(part.mode == 0.0 for part in parts) and correction is None:
        return Biases(bias, pruned, bias)
    sparse = row_sums()
    sparse = sparse * torch.cat([torch.full((part.size,), part.mode, device=sparse.device) for part in parts])
    for value in (bias, correction):
        if value is not None:
            sparse = sparse + value.float()
    return Biases(bias, pruned, sparse)


def served_linear(
    x: Tensor,
    weight: Tensor,
    biases: Biases,
    parts: Sequence[Part],
    decode_only: bool,
    sparse_rows: int | None = None,
) -> Tensor:
    """A layer whose input is pruned, for any number of rows.

    Args:
        x: `[rows, in_features]`.
        weight: `[out_features, in_features]`, on a GPU input-channel-major in memory: strides (1, out_features).
        biases: from `fold`.
        parts: their sizes add up to out_features.
        decode_only: whether more than 8 rows are left dense.
        sparse_rows: up to so many rows run the sparse operation, at most 8; chosen by the number of parts if None.

    Returns:
        `[rows, out_features]`.
    """
    if sparse_rows is None:
        sparse_rows = SPARSE_ROWS if len(parts) == 1 else SPARSE_ROWS_OF_SEVERAL_CRITERIA
    sizes, thresholds, modes, scales = (list(values) for values in zip(*parts, strict=True))
    return _operation(x, weight, *biases, sizes, thresholds, modes, scales, decode_only, sparse_rows)


def _served_linear(
    x: Tensor,
    weight: Tensor,
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
    if decode_only and not decodes(x):
        return F.linear(x, weight, dense_bias)  # one product, whatever the parts are
    weights = [weight[span] for span in spans_of(sizes)]
    biases = Biases(dense_bias, pruned_bias, sparse_bias)
    return multiply_parts(x, weights, "dense", biases, sizes, thresholds, modes, scales, decode_only, sparse_rows)


def multiply_parts(
    x: Tensor,
    tensors: Sequence[Tensor],
    format: str,
    biases: Biases,
    sizes: Sequence[int],
    thresholds: Sequence[float],
    modes: Sequence[float],
    scales: Sequence[Tensor | None],
    decode_only: bool,
    sparse_rows: int,
) -> Tensor:
    """What the operations do, over the tensors of each part in turn, all in the format of `torch.weights`."""
    spans = spans_of(sizes)
    if 0 < row_count(x) <= sparse_rows:
        added = [part_of(biases.sparse, span) for span in spans]
        return joined(library.sparse_linear_group(x, tensors, format, added, thresholds, modes, scales))
    is_dense = decode_only and not decodes(x)
    bias = biases.dense if is_dense else biases.pruned
    weight_format = find_format(format)
    criteria = zip(weight_format.layers(tensors), spans, thresholds, modes, scales, strict=True)
    outputs = [
        weight_format.multiply(x if is_dense else _pruned(x, threshold, mode, scale), layer, part_of(bias, span))
        for layer, span, threshold, mode, scale in criteria
    ]
    return joined(outputs)


def row_count(x: Tensor) -> int:
    """Of `x` `[..., in_features]`."""
    return x.numel() // max(1, x.shape[-1])


def decodes(x: Tensor) -> bool:
    """Whether `x` is pruned where decoding alone is. vLLM's rows do not say whose they are: their number decides."""
    return row_count(x) <= MOST_DECODED_SEQUENCES


def joined(outputs: Sequence[Tensor]) -> Tensor:
    """The outputs of parts, side by side."""
    return outputs[0] if len(outputs) == 1 else torch.cat(list(outputs), dim=-1)


def spans_of(sizes: Sequence[int]) -> list[slice]:
    """The outputs of parts of these sizes, one after the other."""
    return [slice(begin, end) for begin, end in pairwise(accumulate(sizes, initial=0))]


def part_of(bias: Tensor | None, span: slice) -> Tensor | None:
    """The bias of a part of the outputs."""
    return None if bias is None else bias[span]


def _pruned(x: Tensor, threshold: float, mode: float, scale: Tensor | None) -> Tensor:
    return x if threshold < 0 else library.run(library.prune_input, x, threshold, mode, scale)


_library = torch.library.Library(library.NAMESPACE, "FRAGMENT")
_library.define(
    "served_linear(Tensor x, Tensor weight, Tensor? dense_bias, Tensor? pruned_bias, Tensor? sparse_bias, "
    "int[] sizes, float[] thresholds, float[] modes, Tensor?[] scales, bool decode_only, int sparse_rows) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_library.impl("served_linear", _served_linear, "CompositeExplicitAutograd")
torch.library.register_fake(
    f"{library.NAMESPACE}::served_linear",
    lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
    lib=_library,
)
_operation = torch.ops.optimum_scap.served_linear.default
