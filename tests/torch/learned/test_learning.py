"""Learned calibration on models of random weights: what it gains on held-out text, and what it leaves as it was."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, tiny_model
from torch import nn

from optimum_scap import SCAPConfig, SCAPError, sparsify_activations
from optimum_scap.core.criterion import Criterion
from optimum_scap.core.sites import Site
from optimum_scap.core.targets import Group, Target
from optimum_scap.torch.backend import measure_sparsity, pruned_layers, read_parameters
from optimum_scap.torch.learned import memory, objective
from optimum_scap.torch.learned.layers import LearnedLayers
from optimum_scap.torch.learned.objective import Objective, frozen
from optimum_scap.torch.learned.training import Training
from optimum_scap.torch.prunable import in_features, out_features


TARGETS = {"up": 0.35, "gate": 0.35, "down": 0.55}


def leaning_model(name: str = "llama") -> Any:
    """A model whose activations have means that are not zero, as those of trained ones."""
    model = tiny_model(name)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(torch.linspace(-3, 3, model.config.hidden_size))
    return model


def text(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCAB, (1, 48), generator=generator)} for _ in range(count)]


LEARNED_FROM, UNSEEN = text(48, 1), text(12, 2)


def config(*learn: Any, **fields: Any) -> SCAPConfig:
    options = {"learn_steps": 20, "learn_tokens": 384, "num_samples": 16, **fields}
    return SCAPConfig(targets=TARGETS, learn=learn, **options)


@torch.no_grad()
def divergence(dense: Any, sparse: Any, samples: Any = UNSEEN) -> float:
    """KL(dense || sparse) per token."""
    ids = torch.cat([sample["input_ids"] for sample in samples])
    wanted, found = (model(input_ids=ids).logits.float().log_softmax(-1) for model in (dense, sparse))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def realized(model: nn.Module) -> float:
    """The share of the weights of pruned layers that is skipped on the text that thresholds are calibrated on."""
    layers = pruned_layers(model)
    weights = {path: in_features(layer) * out_features(layer) for path, layer in layers.items()}
    skipped = measure_sparsity(model, LEARNED_FROM[:16])
    return sum(skipped[path] * weights[path] for path in weights) / sum(weights.values())


@pytest.fixture(scope="module")
def published() -> float:
    model = leaning_model()
    sparsify_activations(model, config(), LEARNED_FROM[:16])
    return divergence(leaning_model(), model)


@pytest.mark.parametrize(
    "learn",
    [
        pytest.param(("biases",), marks=pytest.mark.slow),
        pytest.param(("thresholds",), marks=pytest.mark.slow),
        ("gains",),
        ("thresholds", "biases"),
    ],
)
def test_each_part_brings_the_model_nearer_to_the_dense_one_on_unseen_text(learn: Any, published: float) -> None:
    model = leaning_model()
    sparsify_activations(model, config(*learn), LEARNED_FROM)
    assert divergence(leaning_model(), model) < 0.97 * published
    assert realized(model) == pytest.approx((2 * 0.35 + 0.55) / 3, abs=0.01)
    skipped = measure_sparsity(model, LEARNED_FROM[:16])
    for path, layer in pruned_layers(model).items():
        assert skipped[path] == pytest.approx(layer.scap_parameters.target_sparsity, abs=0.01), path
        assert ("thresholds" in learn) == (layer.scap_parameters.target_sparsity not in TARGETS.values())


@pytest.mark.parametrize("total", [0.3, pytest.param(0.6, marks=pytest.mark.slow)])
def test_the_total_that_is_asked_for_is_realized(total: float) -> None:
    model = leaning_model()
    sparsify_activations(model, config("thresholds", "biases", total=total), LEARNED_FROM)
    assert realized(model) == pytest.approx(total, abs=0.01)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "opt", "phi3"))]
)
def test_the_model_stays_as_it_was(name: str) -> None:
    model = leaning_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    model.get_input_embeddings().eval()
    next(model.parameters()).requires_grad_(False)
    modes = {module: module.training for module in model.modules()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    fields = config("thresholds", "biases", learn_steps=3, num_samples=8)
    sparsify_activations(model, fields, LEARNED_FROM[:16])
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {key.rpartition(".")[2] for key in after.keys() - before.keys()} == {"scap_bias_correction"}
    assert {module: module.training for module in model.modules()} == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_gains_are_folded_into_the_weights_of_pruned_layers() -> None:
    model, dense = leaning_model(), leaning_model()
    sparsify_activations(model, config("gains", learn_steps=5), LEARNED_FROM)
    pruned = pruned_layers(model)
    changed = 0
    for path, module in dense.named_modules():
        if isinstance(module, nn.Linear):
            ratio = model.get_submodule(path).weight / module.weight
            gains = ratio.median(dim=0).values
            torch.testing.assert_close(ratio, gains.expand_as(ratio), rtol=1e-5, atol=0)
            assert (path in pruned) == bool((gains != 1).any())
            changed += path in pruned
    assert changed == len(pruned) == 6


def test_nothing_is_learned_by_default_and_published_figures_stay() -> None:
    models = [leaning_model(), leaning_model()]
    sparsify_activations(models[0], "up=0.35,gate=0.35,down=0.55", LEARNED_FROM)
    sparsify_activations(models[1], SCAPConfig(targets=TARGETS, learn_steps=7), LEARNED_FROM)
    first, second = (read_parameters(model) for model in models)
    assert first is not None and second is not None and first.layers == second.layers


def test_seeds_repeat() -> None:
    found = []
    for _ in range(2):
        model = leaning_model()
        sparsify_activations(model, config("thresholds", "biases", learn_steps=4), LEARNED_FROM[:16])
        found.append(read_parameters(model))
    assert found[0] == found[1]


def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    own = Training._step

    def run(self: Training, sequences: Any) -> None:
        steps.append(len(steps) + 1)
        if steps[-1] == step:
            raise KeyboardInterrupt
        own(self, sequences)

    monkeypatch.setattr(Training, "_step", run)


def test_ctrl_c_keeps_the_best_that_was_found(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, published: float
) -> None:
    interrupted_at(16, monkeypatch)
    model = leaning_model()
    with caplog.at_level(logging.WARNING):
        sparsify_activations(model, config("thresholds", "biases"), LEARNED_FROM)
    assert "interrupted at step 15 of 20" in caplog.text and "kept" in caplog.text
    assert divergence(leaning_model(), model) < published
    assert realized(model) == pytest.approx((2 * 0.35 + 0.55) / 3, abs=0.01)


def test_ctrl_c_before_anything_is_found_leaves_the_model_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_at(2, monkeypatch)
    model = leaning_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        sparsify_activations(model, config("biases", "gains"), LEARNED_FROM)
    assert not pruned_layers(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_text_without_gain_changes_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Steps that make it worse: the best is what was there before."""
    monkeypatch.setattr("optimum_scap.torch.learned.training.RATES", {"biases": 30.0})
    model, plain = leaning_model(), leaning_model()
    sparsify_activations(model, config("biases", learn_steps=10), LEARNED_FROM)
    sparsify_activations(plain, config(), LEARNED_FROM[:16])
    assert "gained nothing" in caplog.text
    assert divergence(plain, model) < 1e-4


def test_checkpointing_changes_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for needed in (False, True):
        monkeypatch.setattr(memory, "_needs_checkpoints", lambda model, tokens, needed=needed: needed)
        model = leaning_model()
        sparsify_activations(model, config("thresholds", "biases", "gains", learn_steps=4), LEARNED_FROM[:16])
        found.append({key: value.clone() for key, value in model.state_dict().items()})
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "takes_the_head"), [("llama", True), ("gemma2", False)])
@pytest.mark.parametrize("elements", [VOCAB, 2**24])
def test_the_loss_and_its_gradients(
    name: str, takes_the_head: bool, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the whole logits at once; Gemma 2 bounds its logits behind the head."""
    monkeypatch.setattr(objective, "_LOGITS_ON_CPU", elements)
    model = leaning_model(name)
    path = "model.layers.0.mlp.down_proj"
    groups = [Group(Site((path,)), (path,), Target(sparsity=0.5))]
    criteria = {path: Criterion(np.float32(0.0), np.float32(0.5))}
    layers = LearnedLayers(dict(model.named_modules()), groups, criteria, ("thresholds", "biases"))
    ids = torch.cat([sample["input_ids"] for sample in UNSEEN[:2]])
    tensors = [layers.log_thresholds[path], layers.biases[path]]
    with frozen(model), layers.installed():
        found = Objective(model, layers)
        dense = found.dense(ids)
        loss = found.divergence(dense, found.hidden(ids, sparse=True), backward=True)
        assert (found._logits is model.lm_head) == takes_the_head
        layers.sparse = False
        wanted = model(ids).logits.log_softmax(-1)
        layers.sparse = True
        sparse = model(ids).logits.log_softmax(-1)
        whole = (wanted.exp() * (wanted - sparse)).sum()
        gradients = torch.autograd.grad(whole, tensors)
    assert loss == pytest.approx(float(whole), rel=1e-4) and loss > 0
    for tensor, gradient in zip(tensors, gradients, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-3, atol=1e-4)


def test_a_pruned_head_is_learned_too() -> None:
    model = tiny_model("llama")
    targets = {"head": 0.4, "down": 0.5}
    sparsify_activations(
        model,
        SCAPConfig(targets=targets, learn=("thresholds", "biases"), learn_steps=3, learn_tokens=384, num_samples=8),
        LEARNED_FROM[:16],
    )
    parameters = read_parameters(model)
    assert parameters is not None and parameters.tensor("lm_head", "bias_correction") is not None
    assert parameters.layers["lm_head"].target_sparsity != 0.4


def test_padding_is_not_learned_from() -> None:
    """Samples with padding on either side give what the bare sequences give."""
    bare = LEARNED_FROM[:16]
    padded = []
    for number, sample in enumerate(bare):
        zeros = torch.zeros(1, 5, dtype=torch.long)
        parts = [zeros, sample["input_ids"]] if number % 2 else [sample["input_ids"], zeros]
        ones = torch.ones_like(sample["input_ids"])
        masks = [zeros, ones] if number % 2 else [ones, zeros]
        padded.append({"input_ids": torch.cat(parts, 1), "attention_mask": torch.cat(masks, 1)})
    found = []
    for samples in (bare, padded):
        model = leaning_model()
        sparsify_activations(model, config("biases", learn_steps=3), samples)
        found.append(model.state_dict())
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "samples", "message"),
    [
        ("llama", [{"inputs_embeds": torch.zeros(1, 4, 48)}] * 2, "learning reads token ids"),
        ("llama", LEARNED_FROM[:1], "two samples at least"),
        ("bert", LEARNED_FROM[:4], "causal language model"),
        ("vit", [], "causal language model"),
    ],
)
def test_what_cannot_be_learned_from_is_named(name: str, samples: Any, message: str) -> None:
    model = tiny_model(name)
    if "inputs_embeds" in (samples[0] if samples else ()):
        samples = [{"inputs_embeds": torch.randn(1, 4, 48)} for _ in range(2)]
    with pytest.raises(SCAPError, match=message):
        sparsify_activations(model, config("biases"), samples)
    assert not pruned_layers(model)
