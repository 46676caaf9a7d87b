"""The operation that vLLM's layers of integer weights call, against the formula in float64, for any number of rows."""

from collections.abc import Sequence

import pytest
import torch
from integer_problems import in_float64, random_integers
from test_operation import expected
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from optimum_scap.torch.weights import Weights, find_format
from optimum_scap.vllm.integer_operation import kind, served_integer_linear
from optimum_scap.vllm.operation import Biases, Part, fold_sums


IN = 64


def problem(
    bits: int, zero_points: str, modes: tuple[float, float], is_dense: bool = False
) -> tuple[Tensor, list[Weights], list[Part], Biases, Tensor, Tensor]:
    """Weights in float64, packed ones, parts, biases; bias and correction."""
    generator = torch.Generator().manual_seed(5)
    sizes = (40, 70, 8)
    integers = [random_integers(generator, bits, size, IN, 16, zero_points, torch.float32) for size in sizes]
    weights = [find_format(f"int{bits}").pack(each) for each in integers]
    scale = torch.rand(IN, generator=generator) + 0.5
    parts = [Part(40, 0.5, modes[0], scale), Part(70), Part(8, 0.9, modes[1])]
    if is_dense:
        parts = [Part(size) for size in sizes]
    bias, correction = torch.randn(118, generator=generator), torch.randn(118, generator=generator)
    biases = fold_sums(lambda: _row_sums(weights), torch.float32, parts, bias, correction)
    return torch.cat([in_float64(each) for each in integers]), weights, parts, biases, bias, correction


def _row_sums(weights: Sequence[Weights]) -> Tensor:
    return torch.cat([find_format(each.format).row_sums(each.tensors) for each in weights])


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize("modes", [(0.0, 0.0), (0.25, -0.5)])
@pytest.mark.parametrize(("bits", "zero_points"), [(4, "symmetric"), (8, "zero points"), (4, "offsets")])
def test_few_and_many_rows_are_the_formula(
    bits: int, zero_points: str, modes: tuple[float, float], is_dense: bool
) -> None:
    weight, weights, parts, biases, bias, correction = problem(bits, zero_points, modes, is_dense)
    for rows in (0, 1, 8, 9, 40):
        x = torch.randn(rows, IN)
        y = served_integer_linear(x, weights, biases, parts, False)
        torch.testing.assert_close(y.double(), expected(x, weight, parts, bias, correction), rtol=0, atol=2e-5)


def test_decode_only_leaves_many_rows_dense() -> None:
    weight, weights, parts, biases, bias, correction = problem(4, "symmetric", (0.25, -0.5))
    few, many = torch.randn(8, IN), torch.randn(9, IN)
    dense = many.double() @ weight.t() + bias.double()
    torch.testing.assert_close(
        served_integer_linear(many, weights, biases, parts, True).double(), dense, rtol=0, atol=2e-5
    )
    pruned = expected(few, weight, parts, bias, correction)
    torch.testing.assert_close(
        served_integer_linear(few, weights, biases, parts, True).double(), pruned, rtol=0, atol=2e-5
    )


def test_one_program_without_guards_serves_any_number_of_rows() -> None:
    weight, weights, parts, biases, bias, correction = problem(8, "zero points", (0.25, -0.5))

    def forward(x: Tensor, tensors: list[Tensor], biases: Biases) -> Tensor:
        given = [Weights("int8", tuple(tensors[first : first + 3])) for first in range(0, 9, 3)]
        return served_integer_linear(x * 2.0, given, biases, parts, False)

    tensors = [tensor for each in weights for tensor in each.tensors]
    recorded = make_fx(forward, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        torch.randn(40, IN), tensors, biases
    )
    assert "served_integer_linear" in str(recorded.graph)
    for rows in (1, 2, 8, 9, 40):
        x = torch.randn(rows, IN)
        y = recorded(x, tensors, biases)
        torch.testing.assert_close(y.double(), expected(x * 2.0, weight, parts, bias, correction), rtol=0, atol=4e-5)


def test_the_operation_and_its_fake_agree() -> None:
    _, weights, parts, biases, *_ = problem(4, "zero points", (0.25, -0.5))
    sizes, thresholds, modes, scales = (list(values) for values in zip(*parts, strict=True))
    tensors = [tensor for each in weights for tensor in each.tensors]
    for rows in (2, 9):
        torch.library.opcheck(
            torch.ops.optimum_scap.served_integer_linear.default,
            (torch.randn(rows, IN), tensors, "int4", *biases, sizes, thresholds, modes, scales, False, 8),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_what_runs_in_one_operation() -> None:
    generator = torch.Generator().manual_seed(1)
    kinds = [(4, 16, "symmetric"), (8, 16, "symmetric"), (4, 32, "symmetric"), (4, 16, "offsets")]
    packed = [
        find_format(f"int{bits}").pack(random_integers(generator, bits, 8, IN, size, zero_points))
        for bits, size, zero_points in [*kinds, *kinds]
    ]
    found = [kind(weights) for weights in packed]
    assert len(set(found)) == 4 and found[:4] == found[4:]
