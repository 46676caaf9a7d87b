"""What a layer can have besides two numbers, in both backends: a scale, a bias correction, a target of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optimum.intel import OVModelForCausalLM as StockOVModelForCausalLM
from transformers import AutoModelForCausalLM

from optimum_scap import (
    OVModelForCausalLM,
    SCAPConfig,
    SCAPError,
    SCAPParameters,
    Target,
    load_parameters,
    save_parameters,
    sparsify_activations,
)
from optimum_scap.openvino.backend import measure_sparsity as measure_openvino
from optimum_scap.openvino.backend import read_parameters as read_openvino
from optimum_scap.torch.backend import measure_sparsity, pruned_layers, read_parameters


DOWN = "model.layers.0.mlp.down_proj"
TARGETS = {"up": 0.3, "gate": 0.3, "down": Target(sparsity=0.5, scale="weight_norm"), "re:layers\\.1\\..*down": 0.2}
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}


def ids(count: int = 6) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randint(2, 1000, (1, 48)) for _ in range(count)]


def torch_model(tiny: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny / "hf").eval()
    return sparsify_activations(model, SCAPConfig(targets=TARGETS), [{"input_ids": row} for row in ids()])


def with_corrections(parameters: SCAPParameters) -> SCAPParameters:
    """The same with a bias correction for one layer that has a scale, too."""
    return parameters.with_tensor(DOWN, "bias_correction", np.linspace(-0.2, 0.3, 64))


def logits(model: Any, row: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(input_ids=row, attention_mask=torch.ones_like(row)).logits)


def expected(tiny: Path, parameters: SCAPParameters, row: torch.Tensor) -> np.ndarray:
    """The formula through hooks on the dense model."""
    model = AutoModelForCausalLM.from_pretrained(tiny / "hf").eval()

    def hook(path: str) -> Callable[..., Any]:
        criterion, correction = parameters.criterion(path), parameters.tensor(path, "bias_correction")

        def forward(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = args[0].numpy()
            kept = torch.from_numpy(np.where(criterion.prunes(x), criterion.mode, x))
            y = torch.nn.functional.linear(kept, module.weight, module.bias)
            return y if correction is None else y + torch.from_numpy(np.array(correction))

        return forward

    for path in parameters.layers:
        model.get_submodule(path).register_forward_hook(hook(path))
    return logits(model, row)


def assert_close(found: np.ndarray, wanted: np.ndarray) -> None:
    """But for tokens with an activation that rounding moved across its threshold."""
    errors = np.linalg.norm(found - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert np.mean(errors < 1e-3) > 0.8, errors


def test_per_layer_targets_and_scales_in_torch(tiny: Path, tmp_path: Path) -> None:
    model = torch_model(tiny)
    parameters = read_parameters(model)
    assert parameters is not None
    found = {path: (layer.target_sparsity, layer.tensors) for path, layer in parameters.layers.items()}
    assert found[DOWN] == (0.5, ("scale",)) and found["model.layers.1.mlp.down_proj"] == (0.2, ())
    for path, value in measure_sparsity(model, [{"input_ids": row} for row in ids()]).items():
        assert value == pytest.approx(found[path][0], abs=0.015), path
    weight = model.get_submodule(DOWN).weight.detach().numpy()
    norms = np.linalg.norm(weight, axis=0)
    np.testing.assert_allclose(parameters.criterion(DOWN).scale, norms / norms.mean(), rtol=1e-5)
    for row in (ids(1)[0], ids(1)[0][:, :1], ids(1)[0][:, :5]):
        assert_close(logits(model, row), expected(tiny, parameters, row))

    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert read_parameters(loaded) == parameters  # the scale stays float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert np.array_equal(logits(loaded, ids(1)[0]), logits(model, ids(1)[0]))
    assert pruned_layers(loaded.half())[DOWN].scap_scale.dtype == torch.float32  # type: ignore[union-attr]


def test_bias_corrections_in_torch(tiny: Path, tmp_path: Path) -> None:
    parameters = read_parameters(torch_model(tiny))
    assert parameters is not None
    corrected = with_corrections(parameters)
    save_parameters(corrected, tmp_path / "p.json")
    assert load_parameters(tmp_path / "p.json") == corrected
    model = AutoModelForCausalLM.from_pretrained(tiny / "hf").eval()
    sparsify_activations(model, load_parameters(tmp_path / "p.json"))
    for row in (ids(1)[0], ids(1)[0][:, :1]):
        assert_close(logits(model, row), expected(tiny, corrected, row))
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert np.array_equal(logits(loaded, ids(1)[0]), logits(model, ids(1)[0])) and read_parameters(loaded) == corrected
    (tmp_path / "p.safetensors").unlink()
    with pytest.raises(SCAPError, match=r"the tensors in .*p.safetensors cannot be read"):
        load_parameters(tmp_path / "p.json")


def test_the_same_in_openvino(tiny: Path, tmp_path: Path) -> None:
    model = StockOVModelForCausalLM.from_pretrained(tiny / "dense", compile=False)
    sparsify_activations(model, SCAPConfig(targets=TARGETS), [{"input_ids": row.tolist()} for row in ids()])
    parameters = read_openvino(model.model)
    theirs = read_parameters(torch_model(tiny))
    assert parameters is not None and theirs is not None
    assert parameters.layers.keys() == theirs.layers.keys()
    np.testing.assert_allclose(parameters.criterion(DOWN).scale, theirs.criterion(DOWN).scale, rtol=1e-4)
    for path, layer in parameters.layers.items():
        assert layer.threshold == pytest.approx(theirs.layers[path].threshold, rel=0.05)
    samples = [model.prepare_inputs(row, torch.ones_like(row)) for row in ids()]
    for path, value in measure_openvino(model.model, samples).items():
        assert value == pytest.approx(parameters.layers[path].target_sparsity, abs=0.015), path

    corrected = with_corrections(parameters)
    again = StockOVModelForCausalLM.from_pretrained(tiny / "dense", compile=False)
    sparsify_activations(again, corrected)
    again.save_pretrained(tmp_path)
    row = ids(1)[0]
    wanted = expected(tiny, corrected, row)
    for cls in (StockOVModelForCausalLM, OVModelForCausalLM):
        loaded = cls.from_pretrained(tmp_path, ov_config=EXACT)
        assert read_openvino(loaded.model) == corrected
        assert_close(logits(loaded, row), wanted)


def test_vectors_that_do_not_fit_are_refused(tiny: Path) -> None:
    parameters = read_parameters(torch_model(tiny))
    assert parameters is not None
    for model in (
        AutoModelForCausalLM.from_pretrained(tiny / "hf"),
        StockOVModelForCausalLM.from_pretrained(tiny / "dense", compile=False),
    ):
        with pytest.raises(SCAPError, match=f"{DOWN}.*its scale has 3 values"):
            sparsify_activations(model, parameters.with_tensor(DOWN, "scale", np.ones(3)))
    for value in (np.full(4, np.nan), -np.ones(4), np.ones((2, 2)), np.ones(0)):
        with pytest.raises(SCAPError, match="its scale"):
            parameters.with_tensor(DOWN, "scale", value)


def test_excluded_layers_stay_what_they_are(tiny: Path) -> None:
    samples = [{"input_ids": row} for row in ids()]
    model = AutoModelForCausalLM.from_pretrained(tiny / "hf")
    config = SCAPConfig(targets={"up": 0.3, "gate": 0.3}, exclude=("layers.1.self_attn",))
    sparsify_activations(model, config, samples)
    kinds = [type(layer.self_attn.q_proj).__name__ for layer in model.model.layers]
    assert kinds == ["DenseLinear", "Linear"]
    for option, kind in (("stock", "Linear"), ("all", "DenseLinear")):
        model = AutoModelForCausalLM.from_pretrained(tiny / "hf")
        sparsify_activations(model, config.model_copy(update={"dense_layers": option}), samples)
        assert {type(layer.self_attn.q_proj).__name__ for layer in model.model.layers} == {kind}
