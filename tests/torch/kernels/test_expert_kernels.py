"""The operation of a mixture of experts against the formula in float64, for every routing."""

from dataclasses import dataclass

import pytest
import torch
from kernel_problems import DEVICE, DTYPES, Layer, assert_close, expected
from torch import Tensor

from optimum_scap.torch import kernels
from optimum_scap.torch.kernels import launch_experts, library, reference
from optimum_scap.torch.kernels.configurations import LaunchConfiguration


IMPLEMENTATIONS = {"twin": reference.sparse_experts, "triton": launch_experts.sparse_experts}


@dataclass
class Problem:
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    thresholds: Tensor
    modes: Tensor

    def arguments(self, x: Tensor, chosen: Tensor, routing: Tensor, activation: str = "silu") -> tuple:
        biases = (self.gate_up_bias, self.down_bias)
        return (x, chosen, routing, self.gate_up, self.down, *biases, self.thresholds, self.modes, activation)

    def wanted(self, x: Tensor, chosen: Tensor, routing: Tensor, activation: str = "silu") -> Tensor:
        half = self.gate_up.shape[1] // 2
        out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        for row, experts in enumerate(chosen.tolist()):
            for place, expert in enumerate(experts):
                if expert >= self.down.shape[0]:
                    continue
                own, last = (None if b is None else b[expert] for b in (self.gate_up_bias, self.down_bias))
                t, m = self.thresholds[:, expert].tolist(), self.modes[:, expert].tolist()
                gate = Layer(self.gate_up[expert, :half], None if own is None else own[:half], t[0], m[0])
                up = Layer(self.gate_up[expert, half:], None if own is None else own[half:], t[1], m[1])
                hidden = reference.ACTIVATIONS[activation](expected(x[row], gate)) * expected(x[row], up)
                value = expected(hidden.to(x.dtype), Layer(self.down[expert], last, t[2], m[2]))
                out[row] += routing[row, place].double() * value
        return out


def problem(
    experts: int, hidden: int, intermediate: int, dtype: torch.dtype, centered: bool = False, seed: int = 0
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def weights(inputs: int, outputs: int) -> Tensor:
        stored = torch.randn(experts, inputs, outputs, generator=generator) / inputs**0.5
        return stored.to(DEVICE, dtype).transpose(1, 2)

    def biases(outputs: int) -> Tensor | None:
        return torch.randn(experts, outputs, generator=generator).to(DEVICE) if centered else None

    base = torch.tensor([0.5, 0.7, 0.1])[:, None]
    thresholds = (base * (0.8 + 0.4 * torch.rand(3, experts, generator=generator))).to(DEVICE)
    modes = (0.2 * torch.randn(3, experts, generator=generator) * centered).to(DEVICE)
    first, last = weights(hidden, 2 * intermediate), weights(intermediate, hidden)
    return Problem(first, last, biases(2 * intermediate), biases(hidden), thresholds, modes)


def routed(rows: int, choices: int, experts: int, hidden: int, dtype: torch.dtype, seed: int = 1) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, hidden, generator=generator).to(DEVICE, dtype)
    scores = torch.randn(rows, experts, generator=generator)
    weights, chosen = scores.softmax(-1).topk(choices, dim=-1)
    return x, chosen.to(DEVICE), weights.to(DEVICE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("centered", [False, True])
def test_experts_are_the_formula(implementation, dtype: torch.dtype, centered: bool) -> None:
    layers = problem(5, 24, 20, dtype, centered)
    inputs = routed(2, 2, 5, 24, dtype)
    assert_close(implementation(*layers.arguments(*inputs)), layers.wanted(*inputs))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(implementation, activation: str) -> None:
    layers, inputs = problem(3, 16, 24, torch.float32), routed(1, 3, 3, 16, torch.float32)
    assert_close(implementation(*layers.arguments(*inputs, activation)), layers.wanted(*inputs, activation))


@pytest.mark.parametrize(("slices", "rows"), [(1, 1), (3, 1), pytest.param(1, 4, marks=pytest.mark.slow), (3, 4)])
def test_slices_and_odd_shapes(slices: int, rows: int) -> None:
    layers, inputs = problem(4, 19, 140, torch.float32, True), routed(rows, 2, 4, 19, torch.float32)
    configuration = LaunchConfiguration(1, 4, slices, 64)
    y = launch_experts.sparse_experts(*layers.arguments(*inputs), configuration)
    assert_close(y, layers.wanted(*inputs))
    # There is one order in which sums are added.
    assert torch.equal(y, launch_experts.sparse_experts(*layers.arguments(*inputs), configuration))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_experts_that_are_elsewhere_add_nothing(implementation) -> None:
    layers = problem(4, 16, 24, torch.float32, True)
    x, chosen, routing = routed(2, 2, 4, 16, torch.float32)
    chosen[0, 0], chosen[1] = 4, 7
    y = implementation(*layers.arguments(x, chosen, routing))
    assert_close(y, layers.wanted(x, chosen, routing))
    assert not y[1].any()


def test_weights_of_experts_that_were_not_chosen_are_not_read() -> None:
    layers = problem(4, 16, 24, torch.float32)
    x, _, routing = routed(1, 2, 4, 16, torch.float32)
    chosen = torch.tensor([[2, 0]], device=DEVICE)
    before = launch_experts.sparse_experts(*layers.arguments(x, chosen, routing))
    layers.gate_up[[1, 3]], layers.down[[1, 3]] = torch.nan, torch.nan
    # Nor those of channels that are pruned.
    pruned = x[0].abs() <= layers.thresholds[:2, [0, 2]].min()
    layers.gate_up[:, :, pruned] = torch.nan
    after = launch_experts.sparse_experts(*layers.arguments(x, chosen, routing))
    assert torch.equal(before, after)


def test_opcheck_and_errors() -> None:
    layers, inputs = problem(3, 16, 24, torch.float32, True), routed(2, 2, 3, 16, torch.float32)
    torch.library.opcheck(library.sparse_experts, layers.arguments(*inputs))
    arguments = layers.arguments(*inputs)
    given = {"thresholds": layers.thresholds, "modes": layers.modes}
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        kernels.sparse_experts(*arguments[:7], **given, activation="tanh")
    with pytest.raises(ValueError, match="up to 8 rows, got 9"):
        launch_experts.sparse_experts(*layers.arguments(*routed(9, 2, 3, 16, torch.float32)))
    with pytest.raises(ValueError, match="input-channel-major"):
        launch_experts.sparse_experts(*arguments[:3], layers.gate_up.contiguous(), *arguments[4:])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graph_replays_with_changing_routing(dtype: torch.dtype) -> None:
    layers = problem(8, 512, 1360, dtype, True)
    x, chosen, routing = routed(1, 2, 8, 512, dtype)

    def run() -> Tensor:
        return library.sparse_experts(*layers.arguments(x, chosen, routing))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    for seed in range(5):
        for held, new in zip((x, chosen, routing), routed(1, 2, 8, 512, dtype, seed), strict=True):
            held.copy_(new)
        y.fill_(torch.nan)
        graph.replay()
        assert_close(y, layers.wanted(x, chosen, routing))
