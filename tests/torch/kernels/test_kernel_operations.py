"""The kernels as torch operations: opcheck, torch.compile, CUDA graphs, streams, several GPUs."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from kernel_problems import DEVICE, DTYPES, assert_close, expected, random_input, random_layer

from optimum_scap.torch import kernels
from optimum_scap.torch.kernels import library, reference


needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = random_input(generator, 2, 32, dtype)
    a = random_layer(generator, 32, 48, dtype, mode=0.25)
    b = random_layer(generator, 32, 48, dtype, with_bias=False)
    scale = torch.rand(32, generator=generator).to(DEVICE)
    pair = (x, [a.weight], [b.weight], "dense", a.bias, b.bias, a.threshold, b.threshold, a.mode, b.mode, None, scale)
    torch.library.opcheck(library.sparse_linear, (x, [a.weight], "dense", a.bias, a.threshold, a.mode, scale))
    group = (x, [a.weight, b.weight], "dense", [a.bias, b.bias], [a.threshold, b.threshold], [a.mode, b.mode])
    torch.library.opcheck(library.sparse_linear_group, (*group, [None, scale]))
    dense = [layer.weight.t().contiguous() for layer in (a, a)]
    torch.library.opcheck(library.linear_group, (random_input(generator, 1, 48, dtype), dense, "dense", [None, x[0]]))
    torch.library.opcheck(library.sparse_gated_linear, (*pair, "silu"))


def feed_forward(generator: torch.Generator, features: int, hidden: int, dtype: torch.dtype):
    gate, up = (random_layer(generator, features, hidden, dtype, threshold=t) for t in (0.4, 0.6))
    down = random_layer(generator, hidden, features, dtype, threshold=3.0, mode=0.5)
    down.scale = (0.5 + torch.rand(hidden, generator=generator)).to(DEVICE)

    def run(x: torch.Tensor) -> torch.Tensor:
        return kernels.sparse_feed_forward(
            x,
            gate.weight,
            up.weight,
            down.weight,
            gate.bias,
            up.bias,
            down.bias,
            gate_threshold=gate.threshold,
            up_threshold=up.threshold,
            down_threshold=down.threshold,
            down_mode=down.mode,
            down_scale=down.scale,
        )

    def wanted(x: torch.Tensor) -> torch.Tensor:
        hidden_states = reference.ACTIVATIONS["silu"](expected(x, gate)) * expected(x, up)
        return expected(hidden_states.to(x.dtype), down)

    return run, wanted


def test_feed_forward() -> None:
    generator = torch.Generator().manual_seed(1)
    run, wanted = feed_forward(generator, 64, 160, torch.float32)
    x = random_input(generator, 2, 64, torch.float32).view(2, 1, 64)
    assert_close(run(x), wanted(x))


def test_unknown_activation_is_refused() -> None:
    weight = torch.zeros(2, 2, device=DEVICE)
    with pytest.raises(ValueError, match="unknown activation 'tanh', choose from silu"):
        kernels.sparse_gated_linear(weight, weight, weight, gate_threshold=0.0, up_threshold=0.0, activation="tanh")


def test_gradients_are_refused_clearly() -> None:
    x = torch.ones(1, 4, device=DEVICE, requires_grad=True)
    y = kernels.sparse_linear(x, torch.ones(4, 3, device=DEVICE).t(), threshold=0.5)
    with pytest.raises(RuntimeError, match="compute no gradients"):
        y.sum().backward()
    with torch.inference_mode():
        assert torch.equal(
            kernels.sparse_linear(x, torch.ones(4, 3, device=DEVICE).t(), threshold=0.5),
            torch.full((1, 3), 4.0, device=DEVICE),
        )


@needs_gpu
def test_the_dispatcher_is_left_out_only_where_nothing_else_listens() -> None:
    x = torch.ones(1, 4, device=DEVICE)
    assert not library.may_skip_dispatcher(x)  # gradients
    with torch.no_grad():
        assert library.may_skip_dispatcher(x)
        assert not library.may_skip_dispatcher(x.cpu())
        with torch._subclasses.FakeTensorMode() as mode:
            assert not library.may_skip_dispatcher(mode.from_tensor(x))
        with torch.utils.flop_counter.FlopCounterMode(display=False):
            assert not library.may_skip_dispatcher(x)
        seen = []

        def look(row: torch.Tensor) -> torch.Tensor:
            seen.append(library.may_skip_dispatcher(row))
            return row

        torch.func.vmap(look)(x)
        torch.jit.trace(look, (x,), check_trace=False)
        torch.compile(look, fullgraph=False, backend="eager")(x)
        assert not any(seen)


@needs_gpu
def test_direct_calls_compute_what_the_dispatcher_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    run, _ = feed_forward(generator, 64, 160, torch.float16)
    with torch.no_grad():
        for rows in (1, 3):
            x = random_input(generator, rows, 64, torch.float16)
            direct = [run(x), run(x + 0.0)]  # the second launch is planned
            with monkeypatch.context() as patch:
                patch.setattr(library, "may_skip_dispatcher", lambda _: False)
                dispatched = run(x)
            assert all(torch.equal(result, dispatched) for result in direct)


def test_importing_the_operations_does_not_import_triton() -> None:
    code = (
        "import sys, torch, optimum_scap.torch.kernels as kernels\n"
        "sys.modules['triton'] = None\n"
        "y = kernels.sparse_linear(torch.ones(1, 4), torch.ones(4, 3).t(), threshold=0.5)\n"
        "assert y.tolist() == [[4.0, 4.0, 4.0]]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("version", "complaint"), [(None, "it is not installed"), ("3.4.0", "this is 3.4.0")])
def test_without_a_triton_that_can_the_twin_runs_and_one_warning_is_given(
    version: str | None,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "triton", version and SimpleNamespace(__version__=version))
    library.triton_is_there.cache_clear()
    for _ in range(2):
        assert not library.triton_is_there()
    assert [complaint in record.message for record in caplog.records] == [True]
    y = kernels.sparse_linear(torch.ones(1, 4, device=DEVICE), torch.ones(4, 3, device=DEVICE).t(), threshold=0.5)
    assert y.tolist() == [[4.0, 4.0, 4.0]]
    library.triton_is_there.cache_clear()


@pytest.mark.timeout(300)
def test_compiles_as_one_graph() -> None:
    generator = torch.Generator().manual_seed(2)
    run, wanted = feed_forward(generator, 64, 160, torch.float32)
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for seed in range(2):
        x = random_input(generator.manual_seed(seed), 1, 64, torch.float32)
        with torch.no_grad():
            assert_close(compiled(x), wanted(x))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graph_replays_with_changing_sparsity(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    run, wanted = feed_forward(generator, 512, 1360, dtype)
    x = random_input(generator, 1, 512, dtype)
    run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x)
    for scale in (1.0, 0.01, 30.0, 0.0, 0.7):
        x.copy_(scale * random_input(generator, 1, 512, dtype))
        y.fill_(torch.nan)
        graph.replay()
        assert_close(y, wanted(x))


@needs_gpu
def test_reduce_overhead_mode() -> None:
    generator = torch.Generator().manual_seed(4)
    run, wanted = feed_forward(generator, 512, 1360, torch.float16)
    compiled = torch.compile(run, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for scale in (1.0, 0.5, 2.0, 0.1, 1.0):
            x = scale * random_input(generator, 1, 512, torch.float16)
            assert_close(compiled(x).clone(), wanted(x))


@needs_gpu
def test_streams_and_graphs_share_nothing() -> None:
    """Eight streams, each with a graph of the same layers and inputs of its own, replay at the same time."""
    generator = torch.Generator().manual_seed(5)
    run, wanted = feed_forward(generator, 1024, 2752, torch.float16)
    problems = []
    for _ in range(8):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        x = random_input(generator, 1, 1024, torch.float16)
        with torch.cuda.stream(stream):
            run(x)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            y = [run(x) for _ in range(20)]
        problems.append((stream, graph, x, y))
    torch.cuda.synchronize()
    for _ in range(10):
        for stream, graph, _, _ in problems:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for _, _, x, results in problems:
        assert_close(results[0], wanted(x))
        assert all(torch.equal(results[0], result) for result in results)


@needs_gpu
def test_eager_streams_run_beside_each_other() -> None:
    generator = torch.Generator().manual_seed(6)
    run, wanted = feed_forward(generator, 1024, 2752, torch.float16)
    streams = [torch.cuda.Stream() for _ in range(4)]
    inputs = [random_input(generator, 1, 1024, torch.float16) for _ in streams]
    torch.cuda.synchronize()
    results = [[] for _ in streams]
    for _ in range(50):
        for stream, x, outputs in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(run(x))
    torch.cuda.synchronize()
    for x, outputs in zip(inputs, results, strict=True):
        assert_close(outputs[0], wanted(x))
        assert all(torch.equal(outputs[0], output) for output in outputs)


@needs_gpu
def test_more_than_two_to_the_31_weights() -> None:
    in_features, out_features = 40_000, 60_000
    weight = torch.zeros(in_features, out_features, dtype=torch.float16, device=DEVICE).t()
    channels = torch.tensor([0, 35_791, 35_792, in_features - 1], device=DEVICE)
    weight[:, channels] = torch.arange(1, 5, dtype=torch.float16, device=DEVICE)
    x = torch.zeros(1, in_features, dtype=torch.float16, device=DEVICE)
    x[0, channels] = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float16, device=DEVICE)
    x[0, 17] = 0.25
    y = kernels.sparse_linear(x, weight, threshold=0.5)
    assert torch.equal(y, torch.full_like(y, 4321.0).to(torch.float16))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_its_input_is() -> None:
    generator = torch.Generator().manual_seed(7)
    layer = random_layer(generator, 64, 80, torch.float16)
    x = random_input(generator, 1, 64, torch.float16)
    y = kernels.sparse_linear(
        x.to("cuda:1"), layer.weight.to("cuda:1"), layer.bias.to("cuda:1"), threshold=layer.threshold
    )
    assert y.device.index == 1
    assert_close(y.to("cuda:0"), expected(x, layer))
