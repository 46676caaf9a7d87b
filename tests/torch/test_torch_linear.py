"""The layers themselves: the formula on both of its paths, and everything that is done to modules."""

import copy
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model, tiny_samples
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from optimum_scap import SCAPConfig, SCAPError, sparsify_activations
from optimum_scap.core.config import ApplyTo
from optimum_scap.core.parameters import LayerParameters
from optimum_scap.torch import linear as layers
from optimum_scap.torch.backend import pruned_layers
from optimum_scap.torch.blocks.gated import _GatedForward
from optimum_scap.torch.convert import convert
from optimum_scap.torch.linear import SCAPLinear
from optimum_scap.torch.prunable import is_fully_connected


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="module")
def on_the_gpu_if_there_is_one() -> Iterator[None]:
    with DEVICE:
        yield


@pytest.fixture(params=["as it lies", "as the kernels read it"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The order of the weights in memory, which is that of the kernels wherever these run."""
    if request.param != "as it lies":
        monkeypatch.setattr(layers, "wants_input_major", lambda weight: True)
    elif DEVICE.type != "cpu":
        pytest.skip("kernels run here")
    return request.param


def strides(order: str, outputs: int, inputs: int) -> tuple[int, int]:
    return (inputs, 1) if order == "as it lies" else (1, outputs)


def parameters(mode: float = 0.0, threshold: float = 0.5) -> LayerParameters:
    method = "zero" if mode == 0 else "median"
    return LayerParameters(role="up", method=method, target_sparsity=0.5, mode=mode, threshold=threshold)


def pruned_linear(
    inputs: int, outputs: int, mode: float = 0.0, threshold: float = 0.5, bias: bool = True, apply_to: ApplyTo = "all"
) -> nn.Module:
    layer = nn.Linear(inputs, outputs, bias=bias)
    convert(layer, parameters(mode, threshold), apply_to)
    return layer


def formula(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """The definition in float64, with the comparison in float32."""
    mode, threshold = layer.scap_mode, layer.scap_threshold
    keep = ~((x.float() - mode).abs() <= threshold)
    centered = torch.where(keep, x.double() - mode, 0.0)
    weight = layer.output_major_weight().detach().double()
    y = centered @ weight.T + mode * weight.sum(1)
    return y if layer.bias is None else y + layer.bias.detach().double()


@settings(deadline=None, max_examples=60)
@given(
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    rows=st.integers(0, 20),
    mode=st.sampled_from([0.0, 0.25, -1.5]),
    threshold=st.sampled_from([0.0, 0.5, 100.0]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_formula(
    inputs: int, outputs: int, rows: int, mode: float, threshold: float, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = pruned_linear(inputs, outputs, mode, threshold, bias)
    x = torch.randn(rows, inputs)
    x[torch.rand(rows, inputs) < 0.2] = mode + threshold  # exactly on the threshold
    with torch.no_grad():
        y = layer(x)
    assert y.shape == (rows, outputs)
    torch.testing.assert_close(y.double(), formula(x, layer), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 64])
def test_nan_is_kept_and_what_is_on_the_threshold_is_not(rows: int) -> None:
    layer = pruned_linear(8, 4, bias=False)
    x = torch.full((rows, 8), 0.5)
    x[0, 1] = -0.5
    with torch.no_grad():
        assert torch.equal(layer(x), torch.zeros(rows, 4))
        x[0, 2] = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
        torch.testing.assert_close(layer(x)[0], x[0, 2] * layer.weight[:, 2])
        x[0, 3] = float("nan")
        assert layer(x)[0].isnan().all()


@pytest.mark.parametrize("rows", [1, 32])
def test_the_input_may_be_named(rows: int) -> None:
    layer, x = pruned_linear(8, 4), torch.randn(rows, 8)
    assert torch.equal(layer(input=x), layer(x))
    conv1d = Conv1D(4, 8)
    convert(conv1d, parameters(), "all")
    assert torch.equal(conv1d(x=x), conv1d(x))


@pytest.mark.parametrize("rows", [1, 32])
def test_autocast(rows: int) -> None:
    layer, x = pruned_linear(16, 8, mode=0.3), torch.randn(rows, 16)
    with torch.no_grad(), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), formula(x, layer), atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pickled_models(name: str) -> None:
    model, samples = tiny_model(name), tiny_samples(name)
    sparsify_activations(model, SCAPConfig.from_spec("0.4", mode="median"), samples)
    again = pickle.loads(pickle.dumps(model))
    assert pruned_layers(again).keys() == pruned_layers(model).keys()
    with torch.no_grad():
        for ids in (samples[0]["input_ids"], samples[0]["input_ids"][:1, :1]):
            assert torch.equal(again(ids).logits, model(ids).logits)


def test_sparsified_in_inference_mode_and_trained_later() -> None:
    layer = nn.Linear(24, 10)
    with torch.inference_mode():
        convert(layer, parameters(0.3), "all")
        layer(torch.randn(1, 24))
    layer(torch.randn(4, 24)).square().sum().backward()
    assert layer.weight.grad is not None
    with torch.inference_mode():
        made_here = pruned_linear(24, 10, mode=0.3)
        made_here(torch.randn(1, 24))


def test_conv1d() -> None:
    torch.manual_seed(0)
    layer = Conv1D(6, 10)  # output features first
    reference = nn.Linear(10, 6)
    with torch.no_grad():
        reference.weight.copy_(layer.weight.T)
        reference.bias.copy_(layer.bias)
    for module in (layer, reference):
        convert(module, parameters(0.3, 0.4), "all")
    assert layer.weight.shape == (10, 6)
    for rows in (1, 3, 40):
        x = torch.randn(2, rows, 10)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), reference(x))


def test_decode_only() -> None:
    layer = pruned_linear(16, 8, threshold=1.0, apply_to="decode")
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        step = layer(x[:, :1])
        many = torch.randn(9, 1, 16)  # sequences
        torch.testing.assert_close(layer(many), F.linear(many, layer.weight, layer.bias))
    torch.testing.assert_close(step.double(), formula(x[:, :1], layer), atol=1e-4, rtol=1e-4)


def test_gradients_pass_through_what_is_kept() -> None:
    layer = pruned_linear(6, 3, mode=0.2, threshold=0.5)
    x = torch.tensor([[0.0, 1.0, -2.0, 0.7, 0.71, -0.31]], requires_grad=True)
    layer(x).sum().backward()
    kept = torch.tensor([[False, True, True, False, True, True]])
    assert torch.equal(x.grad != 0, kept)
    torch.testing.assert_close(x.grad[kept], layer.weight.sum(0)[kept[0]].detach())
    assert layer.weight.grad is not None and layer.bias.grad is not None
    torch.testing.assert_close(layer.weight.grad[0], torch.where(kept, x.detach(), 0.2)[0])


def test_there_is_one_copy_of_the_weights(order: str) -> None:
    layer = nn.Linear(12, 5)
    before = layer.weight
    convert(layer, parameters(), "all")
    assert layer.weight is before and layer.weight.shape == (5, 12) and layer.weight.stride() == strides(order, 5, 12)
    assert layer.weight.untyped_storage().nbytes() == 12 * 5 * 4


def test_weights_that_leave_the_gpu_lie_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "wants_input_major", lambda weight: True)
    layer, turned = pruned_linear(12, 5, mode=0.3), nn.Linear(12, 5)
    turned.weight.data = turned.weight.data.t().contiguous().t()  # by its owner, who may share them with others
    convert(turned, parameters(), "all")
    monkeypatch.setattr(layers, "wants_input_major", lambda weight: False)
    for each in (layer, turned):
        each.cpu()
    assert layer.weight.stride() == (12, 1) and turned.weight.stride() == (1, 5)


def test_moved_converted_and_copied_layers_stay_right(order: str) -> None:
    layer = pruned_linear(24, 10, mode=0.3)
    x = torch.randn(3, 24)
    copied, converted, moved = (copy.deepcopy(layer) for _ in range(3))
    pickled = pickle.loads(pickle.dumps(layer))
    for other in (copied, converted.double().float(), moved.to("cpu").to(DEVICE), pickled, moved.share_memory()):
        assert isinstance(other, SCAPLinear) and other.weight.stride() == strides(order, 10, 24)
        with torch.no_grad():
            assert torch.equal(other(x), layer(x))
    half = copy.deepcopy(layer).half()
    with torch.no_grad():
        torch.testing.assert_close(half(x.half()).double(), formula(x.half(), half), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts(assign: bool, order: str) -> None:
    layer, other = pruned_linear(24, 10, mode=0.3), pruned_linear(24, 10, mode=0.3)
    state = layer.state_dict()
    assert state.keys() == {"weight", "bias"} and all(value.is_contiguous() for value in state.values())
    assert layer.state_dict(keep_vars=True)["weight"] is layer.weight
    dense = nn.Linear(24, 10)
    dense.load_state_dict(state)
    assert torch.equal(dense.weight, layer.weight)
    other.load_state_dict(state, assign=assign)
    x = torch.randn(2, 24)
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))
    assert other.weight.stride() == strides(order, 10, 24)


def test_state_dicts_hold_no_copies_without_need(order: str) -> None:
    layer = pruned_linear(24, 10)
    shared = layer.state_dict()["weight"].data_ptr() == layer.weight.data_ptr()
    assert shared == (order == "as it lies")
    conv1d = Conv1D(10, 24)  # which lies as the kernels read it
    convert(conv1d, parameters(), "all")
    assert conv1d.state_dict()["weight"].data_ptr() == conv1d.weight.data_ptr()


def test_state_dicts_that_do_not_fit_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "wants_input_major", lambda weight: True)
    layer = pruned_linear(24, 10)
    contiguous, fails = torch.Tensor.contiguous, [True]

    def full_once(tensor: torch.Tensor) -> torch.Tensor:
        if fails and fails.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return contiguous(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", full_once)
        weight = layer.state_dict()["weight"]
    assert not fails and weight.device.type == "cpu" and weight.is_contiguous()
    assert torch.equal(weight, layer.weight.detach().cpu())


def test_weights_that_are_trained_are_used_with_their_new_values() -> None:
    layer = pruned_linear(24, 10, mode=0.3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(4, 24)).square().sum().backward()
    optimizer.step()
    x = torch.randn(1, 24)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), formula(x, layer), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rows", "mode"), itertools.product([1, 32], [0.0, 0.3]))
def test_torch_compile_without_graph_breaks(rows: int, mode: float) -> None:
    layer = pruned_linear(16, 8, mode=mode)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(rows, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_what_cannot_be_pruned() -> None:
    assert not is_fully_connected(nn.MultiheadAttention(8, 2).out_proj)
    assert not is_fully_connected(nn.Embedding(4, 4))
    assert not is_fully_connected(nn.Conv1d(4, 4, 1))
    with pytest.raises(SCAPError, match="Embedding"):
        convert(nn.Embedding(4, 4), parameters(), "all")

    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(input)

    class Rewritten(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            y = input @ self.weight.T
            return y if self.bias is None else y + self.bias

    assert not is_fully_connected(Scaled(4, 4))
    assert is_fully_connected(Rewritten(4, 4))
    assert not is_fully_connected(nn.LazyLinear(4))
    assert not is_fully_connected(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    assert not is_fully_connected(patched)
    layer = pruned_linear(4, 4)
    with pytest.raises(SCAPError, match="already"):
        convert(layer, parameters(), "all")


def test_hooks_and_repr_survive() -> None:
    layer = nn.Linear(4, 4)
    calls: list[str] = []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    convert(layer, parameters(), "all")
    layer(torch.randn(1, 4))
    assert calls == ["forward"]
    assert "threshold=0.5" in repr(layer) and "in_features=4" in repr(layer)
    layer.scap_parameters = layer.scap_parameters.model_copy(update={"role": None})
    assert "role" not in repr(layer) and "None" not in repr(layer)


def test_a_whole_model_compiles_and_generates(tmp_path: Path) -> None:
    model, samples = tiny_model("llama"), tiny_samples("llama")
    sparsify_activations(model, "0.4", samples)
    ids = samples[0]["input_ids"][:1, :6]
    eager = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits, expected)
    static = model.generate(
        input_ids=ids, max_new_tokens=8, do_sample=False, cache_implementation="static", disable_compile=True
    )
    assert torch.equal(eager, static)


def test_lora_on_top(tmp_path: Path) -> None:
    model, samples = tiny_model("llama"), tiny_samples("llama")
    sparsify_activations(model, SCAPConfig.from_spec("0.4", mode="median"), samples)
    ids = samples[0]["input_ids"]
    config = peft.LoraConfig(r=2, target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    assert all(isinstance(module, SCAPLinear) for module in pruned_layers(adapted).values())
    adapted.train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, value in adapted.named_parameters() if value.grad is not None}
    assert trained and all("lora" in name for name in trained)
    adapted.eval()
    merged = copy.deepcopy(adapted).merge_and_unload().eval()
    assert len(pruned_layers(merged)) == 6
    with torch.no_grad():
        # one row runs the sparse operation, many rows the dense product
        torch.testing.assert_close(adapted(ids[:1, :1]).logits, adapted(ids).logits[:1, :1], atol=1e-4, rtol=1e-4)
        merged(ids)
        step = merged.model.layers[0].mlp.down_proj
        x = torch.randn(1, step.weight.shape[1])
        torch.testing.assert_close(step(x).double(), formula(x, step), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
@pytest.mark.parametrize("mode", ["zero", "median"])
def test_gated_blocks_run_gate_and_up_together(name: str, mode: str) -> None:
    model, samples = tiny_model(name), tiny_samples(name)
    sparsify_activations(model, SCAPConfig.from_spec("up=0.3,gate=0.5,down=0.4", mode=mode), samples)
    block = model.model.layers[0].mlp
    assert isinstance(block, _GatedForward) and type(block).__name__.endswith("MLP")
    for shape in ((1, 1), (3, 1), (1, 8), (2, 30)):
        x = torch.randn(*shape, block.gate_proj.in_features)
        with torch.no_grad():
            expected = block.down_proj(block.act_fn(block.gate_proj(x)) * block.up_proj(x))
            torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(block)(x), block(x))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("spec", ["up=0.3,gate=0.3,down=0.4", "up=0.3,gate=0.5,down=0.4", "up=0.3,gate=0.3"])
@pytest.mark.parametrize("mode", ["zero", "median"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gated_blocks_give_the_same_for_many_tokens(name: str, spec: str, mode: str, dtype: torch.dtype) -> None:
    model, samples = tiny_model(name), tiny_samples(name)
    sparsify_activations(model, SCAPConfig.from_spec(spec, mode=mode), samples)
    block = model.to(dtype).model.layers[0].mlp
    x = torch.randn(2, 30, block.gate_proj.in_features, dtype=dtype)

    def expected() -> torch.Tensor:
        return block.down_proj(block.act_fn(block.gate_proj(x)) * block.up_proj(x))

    given = x.clone()
    with torch.no_grad():
        assert torch.equal(block(x), expected())
        assert torch.equal(x, given)
    assert torch.equal(block(x), expected())  # gradients are wanted
    block(x).sum().backward()
    assert all(layer.weight.grad is not None for layer in (block.gate_proj, block.up_proj, block.down_proj))


def test_hooks_of_a_gated_block_are_called() -> None:
    model, samples = tiny_model("llama"), tiny_samples("llama")
    sparsify_activations(model, SCAPConfig.from_spec("up=0.3,gate=0.3,down=0.4"), samples)
    block = model.model.layers[0].mlp
    called: list[nn.Module] = []
    layers = [block.gate_proj, block.up_proj, block.down_proj]
    for layer in layers:
        layer.register_forward_hook(lambda module, *_: called.append(module))
    with torch.no_grad():
        block(torch.randn(2, 30, block.gate_proj.in_features))
    assert called == layers


@pytest.mark.parametrize("name", ["phi3", "gpt2", "opt", "falcon"])
def test_other_blocks_are_left_alone(name: str) -> None:
    model = tiny_model(name)
    sparsify_activations(model, "0.4", tiny_samples(name))
    assert not any(isinstance(module, _GatedForward) for module in model.modules())


@pytest.mark.parametrize("rows", [1, 32])
def test_what_is_compiled_is_the_sparse_operation(rows: int) -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    with torch.no_grad():
        torch.compile(pruned_linear(16, 8), fullgraph=True, backend=backend)(torch.randn(rows, 16))
    assert ("optimum_scap.sparse_linear" in graphs[0]) == (rows == 1)


def test_exported_programs_hold_ordinary_operations() -> None:
    program = torch.export.export(pruned_linear(16, 8, mode=0.3).eval(), (torch.randn(1, 16),))
    assert not any("optimum_scap" in str(node.target) for node in program.graph.nodes)


def test_exported_programs_serve_any_number_of_rows() -> None:
    layer = pruned_linear(16, 8).eval()
    shapes = {"input": {0: torch.export.Dim("rows", min=2, max=100)}}
    program = torch.export.export(layer, (torch.randn(20, 16),), dynamic_shapes=shapes)
    x = torch.randn(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), layer(x))


@settings(deadline=None, max_examples=200)
@given(
    threshold=st.floats(0, 1e5, width=32) | st.floats(0, 2.0**-20, width=32),
    offset=st.integers(-3, 3),
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_many_rows_compare_as_float32_does(dtype: torch.dtype, threshold: float, offset: int) -> None:
    layer = nn.Linear(1, 1, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    convert(layer, parameters(0.0, threshold), "all")
    # the threshold in this dtype, and its neighbors
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    near = (torch.tensor(threshold).to(dtype).view(integer) + offset).clamp(min=0).view(dtype)
    x = torch.stack([near, -near, torch.tensor(float("nan"), dtype=dtype, device=near.device)]).repeat(16)[:, None]
    with torch.no_grad():
        y = layer(x)
    keep = ~(x.float().abs() <= threshold)
    expected = torch.where(keep, x, 0).float()
    assert torch.equal(y.float().nan_to_num(7.0), expected.nan_to_num(7.0))


def test_a_layer_whose_hook_was_removed_prunes() -> None:
    """accelerate leaves the class's own forward on the instance, where it would hide that of the pruned layer."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    layer = nn.Linear(4, 3)
    add_hook_to_module(layer, ModelHook())
    remove_hook_from_module(layer)
    convert(layer, LayerParameters(role="up", method="zero", target_sparsity=0.5, mode=0.0, threshold=1.0), "all")
    x = torch.tensor([[0.5, -0.5, 2.0, -3.0]])
    torch.testing.assert_close(layer(x), F.linear(torch.tensor([[0.0, 0.0, 2.0, -3.0]]), layer.weight, layer.bias))
