"""Sparse mixtures of experts: prefill, decode, thresholds of all experts or of each, padding, saving."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from families import FAMILIES
from torch import nn

from optimum_scap import SCAPConfig, SCAPError, sparsify_activations
from optimum_scap.torch.backend import TorchBackend, measure_sparsity, read_parameters
from optimum_scap.torch.expert_layers import tells_gate_from_up


MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")


def sparse(name: str, spec: str = "0.4", **fields: Any) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    family = FAMILIES[name]
    model, samples = family.build(), family.samples()
    sparsify_activations(model, SCAPConfig.from_spec(spec, **fields), samples)
    return model, samples


def experts_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "_scap_operands")]


def logits(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def formula(experts: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Token by token and expert by expert, in float64."""

    def pruned(values: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        children = experts._modules.get(str(expert), experts)._modules
        layer = children.get(name)
        if layer is None:
            return values.double()
        keep = ~((values.float() - layer.scap_mode).abs() <= layer.scap_threshold)
        return torch.where(keep, values.double(), layer.scap_mode)

    def product(values: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        weight = experts._parameters[name][expert].double()
        bias = experts._parameters[f"{name}_bias"][expert].double() if experts.has_bias else 0.0
        return values @ (weight if experts.is_transposed else weight.t()) + bias

    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for place, expert in enumerate(index[token].tolist()):
            up = product(pruned(x[token], "up", expert), "gate_up_proj", expert)
            if tells_gate_from_up(experts):
                half = up.shape[0] // 2
                gate = product(pruned(x[token], "gate", expert), "gate_up_proj", expert)
                hidden = nn.functional.silu(gate[:half]) * up[half:]
            else:
                hidden = experts._apply_gate(up)
            value = product(pruned(hidden.float(), "down", expert), "down_proj", expert)
            out[token] += weights[token, place].double() * value
    return out


@pytest.mark.parametrize(
    ("name", "spec", "fields"),
    [
        ("mixtral", "0.4", {}),
        ("mixtral", "gate=0.2,up=0.5", {"mode": "median"}),
        ("mixtral", "0.4", {"experts": "each", "mode": "median"}),
        ("qwen2_moe", "down=0.5", {}),
        ("gpt_oss", "0.4", {"mode": "median"}),
    ],
)
def test_any_number_of_tokens_gives_the_formula(name: str, spec: str, fields: dict) -> None:
    model, _ = sparse(name, spec, **fields)
    experts = experts_of(model)[0]
    generator = torch.Generator().manual_seed(3)
    for tokens in (1, 3, 20):
        x = torch.randn(tokens, 48, generator=generator)
        weights, index = torch.randn(tokens, 4, generator=generator).softmax(-1).topk(2)
        with torch.no_grad():
            y = experts(x, index, weights)
        torch.testing.assert_close(y.double(), formula(experts, x, index, weights), atol=1e-5, rtol=1e-5)
    # what belongs to another device adds nothing
    with torch.no_grad():
        for tokens in (x, x[:2]):
            elsewhere = torch.full((len(tokens), 2), 4)
            assert not experts(tokens, elsewhere, weights[: len(tokens)]).any()


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_decoding_gives_what_prefill_gives(name: str) -> None:
    model, samples = sparse(name, mode="median")
    ids = samples[0]["input_ids"][:1, :16]
    whole, cache, steps = logits(model, ids), None, []
    with torch.no_grad():
        for position in range(ids.shape[1]):
            output = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    errors = (torch.cat(steps, 1) - whole).norm(dim=-1) / whole.norm(dim=-1)
    assert errors.median() < 1e-4


@pytest.mark.parametrize("name", MOE)
def test_each_expert_can_have_thresholds_of_its_own(name: str, tmp_path: Path) -> None:
    model, samples = sparse(name, experts="each")
    parameters = read_parameters(model)
    downs = [layer for path, layer in parameters.layers.items() if path.endswith(".down") and ".experts." in path]
    assert len(downs) == 4 * len(experts_of(model))
    assert len({layer.threshold for layer in downs}) > len(experts_of(model))
    assert parameters.config.experts == "each"
    for path, fraction in measure_sparsity(model, samples).items():
        assert abs(fraction - 0.4) <= 0.025, path  # an expert sees a hundred tokens
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read_parameters(again) == parameters
    ids = samples[0]["input_ids"]
    for tokens in (ids, ids[:1, :1]):  # how weights are aligned in memory is seen in the last bit
        torch.testing.assert_close(logits(again, tokens), logits(model, tokens), atol=1e-5, rtol=1e-5)


def never_choose_the_last(model: Any) -> None:
    """Has the routers pass over the last expert."""
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):

            def forward(hidden: torch.Tensor, router: Any = module) -> Any:
                scores = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
                scores[:, -1] = -torch.inf
                top, index = scores.softmax(-1).topk(2, dim=-1)
                return scores, top, index

            module.forward = forward


@pytest.mark.parametrize("thresholds", ["shared", "each"])
def test_experts_that_see_few_tokens(thresholds: str, caplog: pytest.LogCaptureFixture) -> None:
    family = FAMILIES["mixtral"]
    model, samples = family.build(), family.samples()
    never_choose_the_last(model)
    sparsify_activations(model, SCAPConfig.from_spec("0.4", experts=thresholds), samples)
    assert "some experts saw fewer than 64 calibration tokens" in caplog.text
    assert "3 of model.layers.0.mlp.experts; 3 of model.layers.1.mlp.experts" in caplog.text
    layers = read_parameters(model).layers
    if thresholds == "each":
        shared = family.build()
        never_choose_the_last(shared)
        pooled = read_parameters(sparsify_activations(shared, "0.4", samples)).layers
        for name in ("gate", "up", "down"):
            path = "model.layers.0.mlp.experts"
            assert layers[f"{path}.3.{name}"].threshold == pytest.approx(pooled[f"{path}.{name}"].threshold, rel=0.02)
            assert layers[f"{path}.2.{name}"].threshold != layers[f"{path}.3.{name}"].threshold


def test_padding_does_not_count() -> None:
    family = FAMILIES["mixtral"]
    plain, padded = family.build(), family.build()
    samples = [{"input_ids": sample["input_ids"][:1]} for sample in family.samples()]
    pad = torch.full((1, 60), 7)
    mask = torch.cat([torch.ones(1, 48), torch.zeros(1, 60)], 1).long()
    with_padding = [
        {"input_ids": torch.cat([sample["input_ids"], pad], 1), "attention_mask": mask} for sample in samples
    ]
    for experts in ("shared", "each"):
        found = []
        for model, data in ((plain, samples), (padded, with_padding)):
            model = copy.deepcopy(model)
            sparsify_activations(model, SCAPConfig.from_spec("0.4", experts=experts), data)
            found.append({path: layer.threshold for path, layer in read_parameters(model).layers.items()})
        assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_decode_alone() -> None:
    model, samples = sparse("mixtral", apply_to="decode")
    dense = FAMILIES["mixtral"].build()
    ids = samples[0]["input_ids"]
    torch.testing.assert_close(logits(model, ids), logits(dense, ids), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(model, ids[:1, :1]), logits(dense, ids[:1, :1]), atol=1e-3)


def test_copies_and_pickles_stay_sparse_and_their_own() -> None:
    model, samples = sparse("mixtral", mode="median")
    ids = samples[0]["input_ids"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for tokens in (ids, ids[:1, :1]):
            assert torch.equal(logits(twin, tokens), logits(model, tokens))
        experts = experts_of(twin)[0]
        assert experts.down.owner is experts
        with torch.no_grad():
            experts.down_proj.mul_(2)  # the mode is folded anew
        assert not torch.equal(logits(twin, ids[:1, :1]), logits(model, ids[:1, :1]))
        half = logits(twin.to(torch.bfloat16), ids[:1, :1])
        assert half.dtype == torch.bfloat16 and experts._scap_operands[2].dtype == torch.float32


def test_gradients_pass() -> None:
    model, samples = sparse("mixtral")
    model.train()(**samples[0], labels=samples[0]["input_ids"]).loss.backward()
    assert all(module.down_proj.grad.any() and module.gate_up_proj.grad.any() for module in experts_of(model))


def test_calibration_leaves_the_dense_model_as_it_was() -> None:
    family = FAMILIES["mixtral"]
    model, (sample, *others) = family.build(), family.samples()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = logits(model, sample["input_ids"])
    with pytest.raises(SCAPError, match="NaN or infinite"):
        broken = copy.deepcopy(model)
        broken.model.embed_tokens.weight.data.fill_(torch.nan)
        sparsify_activations(broken, "0.4", [sample])
    assert not any("forward" in vars(module) for module in broken.modules())
    backend = TorchBackend(model)
    backend.find_sites(backend.layers(), [sample])
    assert torch.equal(logits(model, sample["input_ids"]), before)
    sparsify_activations(model, "0.4", others)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_experts_do_not_take() -> None:
    family = FAMILIES["mixtral"]
    config = SCAPConfig(targets={"up": {"sparsity": 0.4, "scale": "weight_norm"}})
    with pytest.raises(SCAPError, match=r"experts.up: experts take no scale per channel"):
        sparsify_activations(family.build(), config, family.samples())
    model, samples = sparse("mixtral")
    with pytest.raises(SCAPError, match="sparse experts cannot be exported"), torch.no_grad():
        torch.jit.trace(experts_of(model)[0], (torch.randn(4, 48), torch.zeros(4, 2).long(), torch.ones(4, 2)))


def test_decoding_compiles_as_one_graph() -> None:
    model, _ = sparse("mixtral")
    experts = experts_of(model)[0]
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    x, index, weights = torch.randn(1, 48), torch.tensor([[2, 1]]), torch.tensor([[0.75, 0.25]])
    with torch.no_grad():
        for chosen in (index, index + 1):
            assert torch.equal(compiled(x, chosen, weights), experts(x, chosen, weights))


def test_hooks_of_accelerate_stay() -> None:
    family = FAMILIES["mixtral"]
    plain, _ = sparse("mixtral")
    hooked, offloaded, samples = family.build(), family.build(), family.samples()
    for module in hooked.modules():
        if type(module).__name__ == "MixtralExperts":
            add_hook_to_module(module, ModelHook())
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    for model in (hooked, offloaded):
        sparsify_activations(model, "0.4", samples)
        for tokens in (samples[0]["input_ids"], samples[0]["input_ids"][:1, :1]):
            torch.testing.assert_close(logits(model, tokens), logits(plain, tokens), atol=1e-5, rtol=1e-5)
