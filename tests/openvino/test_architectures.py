"""Every architecture of the roles table, exported by optimum-intel and sparsified on the IR."""

from pathlib import Path

import numpy as np
import pytest
from optimum.intel import OVModelForCausalLM
from tiny_models import CONFIGS, LAYERS, tiny_model, tiny_samples

from optimum_scap import SCAPConfig, sparsify_activations
from optimum_scap.openvino.backend import measure_sparsity, read_parameters
from optimum_scap.torch.backend import read_parameters as read_torch_parameters


DECODERS = [name for name, (class_name, _, _) in CONFIGS.items() if class_name.endswith(("CausalLM", "LMHeadModel"))]
# The quick ones cover each way of naming and laying out layers: the others run nightly.
QUICK = ("llama", "gpt2", "mpt", "opt")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in DECODERS]
)
def test_decoders(name: str, tmp_path: Path) -> None:
    torch_model = tiny_model(name)
    torch_model.save_pretrained(tmp_path / "dense")
    try:
        model = OVModelForCausalLM.from_pretrained(tmp_path / "dense", export=True, compile=False)
    except ValueError as error:
        if "does not allow for the export of the model" not in str(error):
            raise
        pytest.skip(f"optimum-intel: {error}")
    inputs = [{"input_ids": sample["input_ids"]} for sample in tiny_samples(name)]
    for each in inputs:
        each["attention_mask"] = each["input_ids"].new_ones(each["input_ids"].shape)
    samples = [dict(model.prepare_inputs(**each)) for each in inputs]
    config = SCAPConfig.from_spec("0.4", mode="median")
    sparsify_activations(model, config, samples)
    parameters = read_parameters(model.model)
    assert len(parameters.layers) == CONFIGS[name][2] * LAYERS
    for path, sparsity in measure_sparsity(model.model, samples).items():
        assert sparsity == pytest.approx(0.4, abs=0.01) or (sparsity > 0.4 and name == "opt"), path

    # The same layers, by the same names, with the same thresholds as in PyTorch.
    sparsify_activations(torch_model, config, inputs)
    expected = read_torch_parameters(torch_model)
    assert parameters.layers.keys() == expected.layers.keys()
    for path, layer in parameters.layers.items():
        assert layer.role == expected.layers[path].role
        assert layer.threshold == pytest.approx(expected.layers[path].threshold, rel=0.02), path

    model.save_pretrained(tmp_path / "sparse")
    again = OVModelForCausalLM.from_pretrained(tmp_path / "sparse")
    tokens = again.generate(inputs[0]["input_ids"][:1, :8], max_new_tokens=4, do_sample=False)
    assert np.array_equal(tokens[0, :8], inputs[0]["input_ids"][0, :8])
