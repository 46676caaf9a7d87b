"""Encoders and vision models that optimum-intel exports: pruned as in PyTorch, run by our operation."""

from pathlib import Path
from typing import Any

import numpy as np
import optimum.intel
import pytest
import torch
from families import FAMILIES

import optimum_scap
from optimum_scap import SCAPConfig, sparsify_activations
from optimum_scap.core.roles import ROLES
from optimum_scap.openvino.backend import measure_sparsity, read_parameters
from optimum_scap.torch.backend import read_parameters as read_torch_parameters


SPEC = ",".join(f"{role}=0.3" for role in ROLES if role != "head")
F32 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
# Family and class; the quick ones read text and images, the others run nightly.
EXPORTED = {
    "bert": "OVModelForSequenceClassification",
    "vit": "OVModelForImageClassification",
    "roberta": "OVModelForSequenceClassification",
    "distilbert": "OVModelForMaskedLM",
    "deit": "OVModelForImageClassification",
    "swin": "OVModelForImageClassification",
}
QUICK = ("bert", "vit")
# What optimum-intel says about families that it does not export, or not with the transformers that is installed.
REFUSED = {
    "mamba2": "unsupported architecture",
    "mamba": "Maximum required is 5.3.0",
    "modernbert": "unsupported architecture",
    "dinov2": "unsupported architecture",
}


def inputs_of(model: Any, sample: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The sample with the masks and types that the exported model asks for."""
    given = {name: value.numpy() for name, value in sample.items()}
    ids = given.get("input_ids")
    made = {} if ids is None else {"attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {port.get_any_name(): {**made, **given}[port.get_any_name()] for port in model.inputs}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in EXPORTED]
)
def test_the_exported_model_is_pruned_as_the_one_in_torch(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    torch_model = family.build()
    torch_model.save_pretrained(tmp_path / "dense")
    exporter = getattr(optimum.intel, EXPORTED[name])
    model = exporter.from_pretrained(tmp_path / "dense", export=True, compile=False)
    samples = [inputs_of(model.model, sample) for sample in family.samples()]
    config = SCAPConfig.from_spec(SPEC)
    sparsify_activations(model, config, samples)
    sparsify_activations(torch_model, config, family.samples())
    found, expected = read_parameters(model.model), read_torch_parameters(torch_model)
    assert found.layers.keys() == expected.layers.keys()
    for path, layer in found.layers.items():
        assert layer.role == expected.layers[path].role
        assert layer.threshold == pytest.approx(expected.layers[path].threshold, rel=0.05), path
    for path, fraction in measure_sparsity(model.model, samples).items():
        assert abs(fraction - 0.3) <= 0.015, path

    model.save_pretrained(tmp_path / "sparse")
    fast = getattr(optimum_scap, EXPORTED[name]).from_pretrained(tmp_path / "sparse", ov_config=F32)
    stock = exporter.from_pretrained(tmp_path / "sparse", ov_config=F32)
    sample = {key: torch.from_numpy(value) for key, value in samples[0].items()}
    found_rows, rows = (loaded(**sample).logits.flatten(1) for loaded in (fast, stock))
    # A channel within rounding of its threshold may flip, and what comes behind it moves; most inputs must be exact.
    assert ((found_rows - rows).norm(dim=1) / rows.norm(dim=1)).median() < 1e-4
    # q, k and v are one operation, o another, the FFN a third.
    blocks = sum(layer.role == "down" for layer in found.layers.values())
    assert (kinds(fast).count("SCAPLinear"), kinds(fast).count("SCAPFeedForward")) == (2 * blocks, blocks)
    assert not any(kind.startswith("SCAP") for kind in kinds(stock))


def kinds(loaded: Any) -> list[str]:
    """The operations that are executed, as far as their names tell."""
    nodes = loaded.request.get_runtime_model().get_ops()
    return [node.get_friendly_name().rpartition("/")[2] for node in nodes]


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exported_says_so(name: str, tmp_path: Path) -> None:
    """When this fails a new version exports the family: it moves to EXPORTED."""
    family = FAMILIES[name]
    family.build().save_pretrained(tmp_path)
    exporter = {"modernbert": "OVModelForMaskedLM", "dinov2": "OVModelForImageClassification"}
    with pytest.raises(ValueError, match=REFUSED[name]):
        getattr(optimum.intel, exporter.get(name, "OVModelForCausalLM")).from_pretrained(tmp_path, export=True)


@pytest.mark.slow
def test_experts_stay_dense_in_openvino_and_a_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family = FAMILIES["mixtral"]
    family.build().save_pretrained(tmp_path)
    model = optimum.intel.OVModelForCausalLM.from_pretrained(tmp_path, export=True, compile=False)
    ids = [sample["input_ids"] for sample in family.samples()]
    samples = [dict(model.prepare_inputs(input_ids=each, attention_mask=torch.ones_like(each))) for each in ids]
    sparsify_activations(model, SCAPConfig.from_spec(SPEC), samples)
    assert {layer.role for layer in read_parameters(model.model).layers.values()} == {"q", "k", "v", "o"}
    assert "model.layers.0.mlp.experts: experts of a mixture-of-experts model are not pruned" in caplog.text
