"""The operation that vLLM's layers call, against the formula in float64, for any number of rows."""

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from optimum_scap.vllm.operation import Biases, Part, fold, merged, served_linear


IN = 24


def expected(x: Tensor, weight: Tensor, parts: list[Part], bias: Tensor | None, correction: Tensor | None) -> Tensor:
    """keep_i = s_i |x_i - m| > t; y = W · where(keep, x, m) + b + c, part by part."""
    outputs, begin = [], 0
    for part in parts:
        distance = (x - part.mode).abs() * (1.0 if part.scale is None else part.scale)
        kept = torch.where(distance > part.threshold, x.double(), float(part.mode))
        outputs.append(kept @ weight[begin : begin + part.size].double().t())
        begin += part.size
    y = torch.cat(outputs, dim=-1)
    for value in (bias, correction):
        y = y if value is None else y + value.double()
    return y


def problem(modes: tuple[float, ...], with_bias: bool) -> tuple[Tensor, list[Part], Tensor | None, Tensor | None]:
    torch.manual_seed(5)
    scale = torch.rand(IN) + 0.5
    parts = [Part(8, 0.5, modes[0], scale), Part(5), Part(3, 0.9, modes[1])]
    bias, correction = torch.randn(16), torch.randn(16)
    correction[8:13] = 0.0
    return torch.randn(16, IN), parts, bias if with_bias else None, correction if with_bias else None


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("modes", [(0.0, 0.0), (0.25, -0.5)])
@pytest.mark.parametrize("sparse_rows", [None, 0, 8])
@pytest.mark.parametrize("rows", [0, 1, 3, 8, 9, 40])
def test_few_and_many_rows_are_the_formula(
    rows: int, sparse_rows: int | None, modes: tuple[float, ...], with_bias: bool
) -> None:
    weight, parts, bias, correction = problem(modes, with_bias)
    x = torch.randn(rows, IN)
    y = served_linear(x, weight, fold(weight, parts, bias, correction), parts, False, sparse_rows)
    assert y.shape == (rows, 16)
    torch.testing.assert_close(y.double(), expected(x, weight, parts, bias, correction), rtol=0, atol=2e-5)


def test_decode_only_leaves_many_rows_dense() -> None:
    weight, parts, bias, _ = problem((0.25, -0.5), True)
    biases = fold(weight, parts, bias, None)
    few, many = torch.randn(8, IN), torch.randn(9, IN)
    assert torch.equal(
        served_linear(many, weight, biases, parts, True), torch.nn.functional.linear(many, weight, bias)
    )
    pruned = expected(few, weight, parts, bias, None)
    torch.testing.assert_close(served_linear(few, weight, biases, parts, True).double(), pruned, rtol=0, atol=2e-5)
    assert (pruned - few.double() @ weight.double().t() - bias.double()).abs().max() > 0.1


def test_shards_of_the_input_add_up_to_the_layer() -> None:
    """Each rank folds the mode with its own shard; one of them adds bias and correction."""
    weight, _, bias, correction = problem((0.0, 0.0), True)
    scale = torch.rand(IN) + 0.5
    whole = [Part(16, 0.6, 0.25, scale)]
    x = torch.randn(3, IN)
    total = torch.zeros(3, 16)
    for rank, span in enumerate((slice(0, 12), slice(12, 24))):
        parts = [Part(16, 0.6, 0.25, scale[span].contiguous())]
        added = (bias, correction) if rank == 0 else (None, None)
        shard = weight[:, span]
        total += served_linear(x[:, span], shard, fold(shard, parts, *added), parts, False)
    torch.testing.assert_close(total.double(), expected(x, weight, whole, bias, correction), rtol=0, atol=2e-5)


def test_neighbors_with_one_criterion_are_one_product() -> None:
    scale = torch.rand(IN)
    parts = [Part(4, 0.5), Part(2, 0.5), Part(2, 0.5, 0.1), Part(3, 0.5, 0.0, scale), Part(1, 0.5, 0.0, scale.clone())]
    assert [(part.size, part.mode) for part in merged(parts)] == [(6, 0.0), (2, 0.1), (4, 0.0)]


def test_one_program_without_guards_serves_any_number_of_rows() -> None:
    """As vLLM runs a compiled model: the number of rows that it was recorded with does not decide for others."""
    weight, parts, bias, correction = problem((0.25, -0.5), True)
    biases = fold(weight, parts, bias, correction)

    def forward(x: Tensor, weight: Tensor, biases: Biases, scale: Tensor | None) -> Tensor:
        return served_linear(x * 2.0, weight, biases, [parts[0]._replace(scale=scale), *parts[1:]], False)

    recorded = make_fx(forward, tracing_mode="symbolic")(torch.randn(40, IN), weight, biases, parts[0].scale)
    assert [str(node.target) for node in recorded.graph.nodes if "optimum_scap" in str(node.target)] == [
        "optimum_scap.served_linear.default"
    ]
    for rows in (1, 2, 8, 9, 40):
        x = torch.randn(rows, IN)
        y = recorded(x, weight, biases, parts[0].scale)
        torch.testing.assert_close(y.double(), expected(x * 2.0, weight, parts, bias, correction), rtol=0, atol=4e-5)


def test_the_operation_and_its_fake_agree() -> None:
    weight, parts, bias, correction = problem((0.25, -0.5), True)
    sizes, thresholds, modes, scales = (list(values) for values in zip(*parts, strict=True))
    arguments = (weight, *fold(weight, parts, bias, correction), sizes, thresholds, modes, scales, False, 8)
    for rows in (2, 9):
        torch.library.opcheck(
            torch.ops.optimum_scap.served_linear.default,
            (torch.randn(rows, IN), *arguments),
            test_utils=("test_schema", "test_faketensor"),
        )
