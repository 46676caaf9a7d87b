"""Learning over integer weights: thresholds and biases take any, gains do not."""

import pytest
import torch
from quantized_checkpoints import float_model
from test_learning import LEARNED_FROM, TARGETS, divergence

from optimum_scap import SCAPConfig, SCAPError, sparsify_activations
from optimum_scap.torch.backend import pruned_layers
from optimum_scap.torch.linear import SCAPQuantizedLinear
from optimum_scap.torch.quantize import quantize_weights
from optimum_scap.torch.quantized import QuantizedLinear


def quantized_model() -> torch.nn.Module:
    model = float_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(torch.linspace(-3, 3, 64))
    quantize_weights(model, "int4", 32)
    return model


def stored(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    return {f"{path}.{name}": value for path, one in layers.items() for name, value in one.stored_tensors().items()}


def test_thresholds_and_biases() -> None:
    dense, plain, model = (quantized_model() for _ in range(3))
    before = stored(model)
    sparsify_activations(plain, SCAPConfig(targets=TARGETS), LEARNED_FROM[:16])
    learned = SCAPConfig(
        targets=TARGETS, learn=("thresholds", "biases"), learn_steps=15, learn_tokens=384, num_samples=16
    )
    sparsify_activations(model, learned, LEARNED_FROM)
    assert {type(layer) for layer in pruned_layers(model).values()} == {SCAPQuantizedLinear}
    assert divergence(dense, model) < 0.95 * divergence(dense, plain)
    assert before and all(torch.equal(value, before[name]) for name, value in stored(model).items())


def test_gains_are_refused_in_one_line_that_says_what_to_do() -> None:
    model = quantized_model()
    with pytest.raises(SCAPError, match="quantized: learn thresholds and biases .--scap-learn ") as error:
        sparsify_activations(model, SCAPConfig(targets=TARGETS, learn=("gains",)), LEARNED_FROM)
    assert "\n" not in str(error.value) and not pruned_layers(model)


def test_gains_of_weights_that_another_layer_reads_are_refused() -> None:
    model = float_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    config = SCAPConfig(targets={"head": 0.3, **TARGETS}, learn=("gains",))
    with pytest.raises(SCAPError, match="lm_head are another layer's as well"):
        sparsify_activations(model, config, LEARNED_FROM)
