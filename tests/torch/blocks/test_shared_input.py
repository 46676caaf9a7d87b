"""q, k and v run together, gate and up too: what comes out is what the layers give one by one."""

import copy
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from tiny_models import CONFIGS, tiny_model, tiny_samples
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_scap import SCAPConfig, sparsify_activations
from optimum_scap.core.roles import find_role
from optimum_scap.torch.blocks import dense as dense_blocks
from optimum_scap.torch.blocks import run_dense_layers_together
from optimum_scap.torch.blocks.dense import DenseLinear
from optimum_scap.torch.checkpoint import kernel_shapes
from optimum_scap.torch.linear import SCAPLinear


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# On a GPU layers that run together are added up in another order than one by one.
EXACT = {"atol": 0.0, "rtol": 0.0} if DEVICE.type == "cpu" else {"atol": 1e-4, "rtol": 1e-4}
ALL = "q=0.4,k=0.4,v=0.4,o=0.4,up=0.4,gate=0.4,down=0.4"


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense layers run our kernel, or its twin, wherever the tests run."""
    monkeypatch.setattr(dense_blocks, "_on_gpu", lambda x: True)


class Operations(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def sparse_model(name: str, spec: str, mode: str = "zero") -> tuple[Any, list[Any]]:
    """A model and samples that it was not calibrated with, whose activations stand on no threshold."""
    model = tiny_model(name).to(DEVICE)
    samples = [{key: value.to(DEVICE) for key, value in sample.items()} for sample in tiny_samples(name)]
    sparsify_activations(model, SCAPConfig.from_spec(spec, mode=mode), samples[1:])
    return model.eval(), samples[:1]


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, **EXACT)


def blocks(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "scap_together")]


def one_by_one(model: Any) -> Any:
    apart = copy.deepcopy(model)
    for block in blocks(apart):
        block.scap_together = ()
    return apart


def nothing_is_left(model: nn.Module) -> bool:
    given = [getattr(module, "scap_given", None) for module in model.modules()]
    return any(each is not None for each in given) and not any(each.forget() for each in given if each is not None)


def outputs(model: Any, sample: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**sample)[0]


def one_token(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"input_ids": sample["input_ids"][:1, :1]}


@pytest.mark.parametrize("mode", ["zero", "median"])
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_gives_what_its_layers_give(name: str, mode: str) -> None:
    model, samples = sparse_model(name, ALL, mode)
    attention = [block for block in blocks(model) if len(block.scap_together) == 3]
    separate = [path for path, _ in model.named_modules() if find_role(path) == "q"]
    assert len(attention) == len(separate)
    assert separate or name not in ("llama", "qwen2", "qwen3", "gemma3", "phi", "opt", "bert", "vit")
    assert all(type(layer) is not nn.Linear for block in attention for layer in block.children())
    apart = one_by_one(model)
    assert_same(outputs(model, samples[0]), outputs(apart, samples[0]))
    if "input_ids" in samples[0]:
        assert_same(outputs(model, one_token(samples[0])), outputs(apart, one_token(samples[0])))
    assert nothing_is_left(model) or not blocks(model)


def test_attention_weights_can_be_asked_for() -> None:
    """transformers finds the blocks that give them by their class."""
    model, samples = sparse_model("llama", ALL)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found, expected = (each(**samples[0], output_attentions=True) for each in (model, one_by_one(model)))
    assert len(found.attentions) == 2
    for weights, wanted in zip(found.attentions, expected.attentions, strict=True):
        assert_same(weights, wanted)


def test_one_token_is_one_operation_and_many_tokens_are_pruned_once() -> None:
    model, samples = sparse_model("llama", ALL)
    with Operations() as together:
        outputs(model, one_token(samples[0]))
    # of 2 blocks: q, k and v; o and down; gate and up
    assert {name: number for name, number in together.count.items() if name.startswith("sparse")} == {
        "sparse_linear_group": 2,
        "sparse_linear": 4,
        "sparse_gated_linear": 2,
    }
    with Operations() as together:
        outputs(model, samples[0])
    assert together.count["hardshrink"] == 2 * 4  # before q, k, v; before o; before gate, up; before down
    with Operations() as apart:
        outputs(one_by_one(model), samples[0])
    assert apart.count["hardshrink"] == 2 * 6


def test_layers_that_prune_differently() -> None:
    model, samples = sparse_model("llama", "q=0.2,k=0.5,v=0.7")
    apart = one_by_one(model)
    for sample in (samples[0], one_token(samples[0])):
        assert_same(outputs(model, sample), outputs(apart, sample))


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi", "opt"])
def test_dense_attention_of_a_sparse_model(name: str) -> None:
    dense, (model, samples) = tiny_model(name).to(DEVICE), sparse_model(name, "0.4")
    assert any(type(module) is DenseLinear for module in model.modules())
    apart = one_by_one(model)
    for sample in (samples[0], one_token(samples[0])):
        assert_same(outputs(model, sample), outputs(apart, sample))
    with Operations() as operations:
        outputs(model, one_token(samples[0]))
    assert operations.count["linear_group"] == 2 * 2  # q, k and v; o
    with Operations() as operations:
        outputs(model, samples[0])
    assert operations.count["linear_group"] == 0
    run_dense_layers_together(dense.eval())
    expected = outputs(tiny_model(name).eval().to(DEVICE), one_token(samples[0]))
    torch.testing.assert_close(outputs(dense, one_token(samples[0])), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("on_gpu")
def test_dense_layers_that_train_or_run_under_autocast_are_as_always() -> None:
    model, samples = sparse_model("llama", "0.4")
    sample = one_token(samples[0])
    with Operations() as operations:
        model(**sample).logits.sum().backward()
    assert operations.count["linear_group"] == 0
    assert all(parameter.grad is not None for parameter in model.parameters())
    with Operations() as operations, torch.autocast(DEVICE.type, torch.bfloat16):
        outputs(model, sample)
    assert operations.count["linear_group"] == 0


def test_dense_layers_on_a_cpu_are_as_always() -> None:
    model, samples = sparse_model("llama", "0.4")
    with Operations() as operations:
        outputs(model.cpu(), {"input_ids": samples[0]["input_ids"][:1, :1].cpu()})
    assert operations.count["linear_group"] == 0


def test_cross_attention_is_left_alone() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
    model = tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0)).eval().to(DEVICE)
    ids = torch.randint(128, (5, 1, 32)).to(DEVICE)
    samples = [{"input_ids": row[:, :24], "decoder_input_ids": row[:, 24:]} for row in ids]
    sparsify_activations(model, SCAPConfig.from_spec("q=0.4,k=0.4,v=0.4"), samples[1:])
    apart = one_by_one(model)
    for _ in range(2):
        assert_same(outputs(model, samples[0]), outputs(apart, samples[0]))
    crossing = [block for path, block in model.named_modules() if path.endswith("EncDecAttention")]
    own = [block for path, block in model.named_modules() if path.endswith("SelfAttention")]
    assert not any(hasattr(block, "scap_together") for block in crossing)
    assert all(len(block.scap_together) == 3 for block in own)


def test_compiles_as_one_graph() -> None:
    model, samples = sparse_model("llama", ALL)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    sample = one_token(samples[0])
    expected = outputs(model, sample)
    with torch.no_grad():
        compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend=backend)
        for _ in range(3):
            torch.testing.assert_close(compiled(sample["input_ids"]), expected)
    assert len(graphs) == 1 and graphs[0].count("optimum_scap.sparse_linear_group") == 2


def test_copies_and_pickles_share_too() -> None:
    model, samples = sparse_model("qwen2", ALL)
    sample = one_token(samples[0])
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [block.scap_together for block in blocks(again)] == [block.scap_together for block in blocks(model)]
        with Operations() as operations:
            assert_same(outputs(again, sample), outputs(model, sample))
        assert operations.count["sparse_linear_group"] == 4  # of both models


def test_saved_models_share_again(tmp_path: Path) -> None:
    model, samples = sparse_model("llama", ALL)
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE)
    assert len(blocks(again)) == 2
    with Operations() as operations:
        torch.testing.assert_close(outputs(again, one_token(samples[0])), outputs(model, one_token(samples[0])))
    assert operations.count["sparse_linear_group"] == 2 + 2


@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        (ALL, {(48, (48, 24, 24)), (48, (96, 96)), (96, (48,)), (48, (48,))}),
        ("q=0.4,k=0.4,up=0.4", {(48, (48,)), (48, (24,)), (48, (96,))}),
    ],
)
def test_what_is_tuned_is_what_runs(spec: str, shapes: set[Any], tmp_path: Path) -> None:
    model, _ = sparse_model("llama", spec)
    model.save_pretrained(tmp_path)
    assert kernel_shapes(tmp_path) == {torch.float32: shapes}


def test_a_forward_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = sparse_model("llama", ALL)
    attention = model.model.layers[0].self_attn
    expected = outputs(model, one_token(samples[0]))

    def fail(*_: Any) -> None:
        raise KeyError("rope")

    handle = attention.k_proj.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="rope"):
        outputs(model, one_token(samples[0]))
    handle.remove()
    assert nothing_is_left(model)
    assert torch.equal(outputs(model, one_token(samples[0])), expected)


def test_adapters_take_a_layer_out_of_its_group() -> None:
    model, samples = sparse_model("llama", ALL)
    expected = outputs(model, one_token(samples[0]))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["k_proj", "up_proj"])).eval()
    with Operations() as operations:
        torch.testing.assert_close(outputs(adapted, one_token(samples[0])), expected)  # an adapter begins as nothing
    assert operations.count["sparse_linear_group"] == 0 and operations.count["sparse_linear"] > 0


def test_threads_that_share_a_model() -> None:
    model, samples = sparse_model("llama", ALL)
    inputs = [{"input_ids": torch.tensor([[token]], device=DEVICE)} for token in range(3, 7)]
    expected = [outputs(model, sample) for sample in inputs]
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(40):
            if not torch.equal(outputs(model, inputs[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("export", [torch.jit.trace, torch.export.export], ids=["trace", "export"])
def test_exported_programs_know_nothing_of_it(export: Callable[..., Any]) -> None:
    model, _ = sparse_model("llama", ALL)
    attention = model.model.layers[0].self_attn

    class Block(nn.Module):
        """An attention block as an exporter calls it."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            return self.attention(x, position_embeddings=(cos, sin), attention_mask=None)[0]

    x = torch.randn(1, 1, attention.q_proj.in_features, device=DEVICE)
    angle = torch.zeros(1, 1, attention.head_dim, device=DEVICE)
    arguments = (x, angle + 1, angle)
    with torch.no_grad():
        expected = Block()(*arguments)
        program = export(Block().eval(), arguments)
    program = program.module() if hasattr(program, "module") else program
    torch.testing.assert_close(program(*arguments), expected)
    assert isinstance(attention.q_proj, SCAPLinear) and nothing_is_left(attention)
