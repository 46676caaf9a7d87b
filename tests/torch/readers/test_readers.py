"""Quantized checkpoints are read as they are: the same numbers as the format's own library has, and written back."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nncf
import numpy as np
import pytest
import torch
from checkpoints import write_integer_checkpoint
from quantized_checkpoints import (
    float_model,
    tensors_of,
    write_awq,
    write_compressed_tensors,
    write_gptq,
    write_torchao,
)
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_scap import SCAPError, sparsify_activations
from optimum_scap.torch.checkpoint import config_for_reading
from optimum_scap.torch.linear import SCAPQuantizedLinear
from optimum_scap.torch.quantized import QuantizedLinear


IDS = torch.arange(3, 99).view(2, 48)
PROJECTIONS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj")


class Kind(NamedTuple):
    """How a checkpoint is written; whether the library that made it, which loads it too, is at hand."""

    write: Callable[[Path], Any]
    bits: int
    has_library: bool


def _torchao(kind: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

        config = {
            "int8": lambda: Int8WeightOnlyConfig(),
            "int8 groups": lambda: Int8WeightOnlyConfig(granularity=PerGroup(32)),
            "int4": lambda: IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
        }[kind]()
        write_torchao(folder, config)

    return write


def _compressed(bits: int, symmetric: bool, group_size: int | None, form: str = "pack-quantized") -> Kind:
    return Kind(lambda folder: write_compressed_tensors(folder, bits, symmetric, group_size, form), bits, True)


KINDS = {
    "compressed-tensors int4 symmetric": _compressed(4, True, 32),
    "compressed-tensors int4 asymmetric": _compressed(4, False, 32),
    "compressed-tensors int4 per channel": _compressed(4, True, None),
    "compressed-tensors int8 packed": _compressed(8, True, 32),
    "compressed-tensors int8 asymmetric": _compressed(8, False, None),
    "compressed-tensors int-quantized": _compressed(8, True, None, "int-quantized"),
    "torchao int8": Kind(_torchao("int8"), 8, True),
    "torchao int8 groups": Kind(_torchao("int8 groups"), 8, True),
    "torchao int4": Kind(_torchao("int4"), 4, True),
    "GPTQ": Kind(write_gptq, 4, False),
    "GPTQ symmetric": Kind(lambda folder: write_gptq(folder, sym=True), 4, False),
    "GPTQ 8 bits": Kind(lambda folder: write_gptq(folder, bits=8), 8, False),
    "GPTQ v2": Kind(lambda folder: write_gptq(folder, checkpoint_format="gptq_v2"), 4, False),
    "AWQ": Kind(write_awq, 4, False),
}
NEEDS = {name: "torchao" for name in KINDS if name.startswith("torchao")}
WITH_LIBRARY = [name for name, kind in KINDS.items() if kind.has_library]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """The folder of a kind of checkpoint, and what its writer returned."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name in NEEDS:  # it slows every import of transformers down: not part of the environment of all tests
            pytest.importorskip(NEEDS[name])
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            made[name] = folder, KINDS[name].write(folder)
        return made[name]

    return get


def read(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, config=config_for_reading(str(folder)))


def multiplied_out(module: Any) -> torch.Tensor:
    """The weights as the library that made `module` has them."""
    weight = module._parameters.get("weight")
    if hasattr(weight, "dequantize") and type(weight) is not torch.nn.Parameter:
        return weight.dequantize()
    from compressed_tensors.compressors import BaseCompressor

    form = "pack-quantized" if "weight_packed" in module._parameters else "int-quantized"
    return BaseCompressor.get_value_from_registry(form).decompress(
        dict(module.state_dict()), module.quantization_scheme
    )["weight"]


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", WITH_LIBRARY)
def test_weights_are_bit_by_bit_those_of_the_library(name: str, checkpoints: Any) -> None:
    folder, _ = checkpoints(name)
    own = read(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    for path in PROJECTIONS:
        mine, other = (model.model.layers[1].get_submodule(path) for model in (own, theirs))
        assert type(mine) is QuantizedLinear and mine.scap_format == f"int{KINDS[name].bits}"
        wanted = multiplied_out(other)
        assert torch.equal(mine.dequantized(wanted.dtype), wanted), path
    assert type(own.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.has_library])
def test_weights_are_those_of_the_specification(name: str, checkpoints: Any) -> None:
    folder, meant = checkpoints(name)
    own = read(folder)
    assert len(meant) == 14
    for path, wanted in meant.items():
        weight = own.get_submodule(path).dequantized().double().numpy()
        np.testing.assert_array_equal(weight, wanted.astype(np.float32).astype(np.float64))


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_keeps_its_own_tensors(name: str, checkpoints: Any, tmp_path: Path) -> None:
    """What is saved holds the tensors of the source, bit by bit, and little else; read again it computes the same."""
    folder, _ = checkpoints(name)
    source, own_config = tensors_of(folder), json.loads((folder / "config.json").read_text())["quantization_config"]
    model = read(folder)
    layer = model.model.layers[0].mlp.up_proj
    # Packed weights take the place of the tensors that were loaded.
    assert {name.startswith("scap_packed") for name in layer._buffers} == {True}
    sparsify_activations(model, "0.5", [IDS])
    assert type(layer) is SCAPQuantizedLinear
    model.save_pretrained(tmp_path)
    saved = tensors_of(tmp_path)
    assert saved.keys() == source.keys()
    for key, tensor in source.items():
        assert saved[key].dtype == tensor.dtype and torch.equal(saved[key], tensor), key
    sizes = [(place / "model.safetensors").stat().st_size for place in (tmp_path, folder)]
    assert sizes[0] <= 1.01 * sizes[1]
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "scap" and config["quantization_config"] == own_config
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.model.layers[0].mlp.up_proj) is SCAPQuantizedLinear
    for ids in (IDS, IDS[:, :1], IDS[:1, :1]):
        assert torch.equal(logits(again, ids), logits(model, ids))
    dense = logits(read(folder))
    assert not torch.equal(logits(again), dense)


def test_vectors_per_channel_lie_beside_integer_weights(tmp_path: Path) -> None:
    write_integer_checkpoint(tmp_path / "source")
    source = tensors_of(tmp_path / "source")
    vectors = [name for name in source if name.endswith((".scap_scale", ".scap_bias_correction"))]
    assert vectors
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    assert type(model.model.layers[0].self_attn.q_proj) is SCAPQuantizedLinear
    model.save_pretrained(tmp_path / "saved")
    saved = tensors_of(tmp_path / "saved")
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in source.items())


# Processes of their own: one of them here.
ONE_HERE = [WITH_LIBRARY[0], *(pytest.param(name, marks=pytest.mark.slow) for name in WITH_LIBRARY[1:])]


@pytest.mark.parametrize("name", ONE_HERE)
def test_without_scap_it_is_what_the_user_brought(name: str, checkpoints: Any, tmp_path: Path) -> None:
    folder, _ = checkpoints(name)
    model = read(folder)
    sparsify_activations(model, "0.5", [IDS])
    model.save_pretrained(tmp_path)
    script = (
        "import sys, torch\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "config = AutoConfig.from_pretrained(sys.argv[1])\n"
        "config.quantization_config = config.quantization_config['quantization_config']\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], config=config)\n"
        "assert 'optimum_scap' not in sys.modules\n"
        "torch.save(model(torch.arange(3, 99).view(2, 48)).logits.detach(), sys.argv[2])\n"
    )
    output = tmp_path / "logits.pt"
    result = subprocess.run([sys.executable, "-c", script, tmp_path, output], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    theirs = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(torch.load(output), theirs)


@pytest.mark.parametrize("name", WITH_LIBRARY)
def test_models_that_the_library_loaded(name: str, checkpoints: Any, tmp_path: Path) -> None:
    """In memory, layers of compressed-tensors and torchao are taken over as they are."""
    folder, _ = checkpoints(name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    sparsify_activations(model, "0.5", [IDS])
    kinds = {type(module).__name__ for module in model.modules() if hasattr(module, "in_features")}
    assert kinds == {"SCAPQuantizedLinear", "QuantizedLinear", "Linear"}
    model.save_pretrained(tmp_path)
    source, saved = tensors_of(folder), tensors_of(tmp_path)
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in source.items())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("INT8_ASYM", {}),
        ("INT8_SYM", {}),
        ("INT4_SYM", {"group_size": 32}),
        ("INT4_ASYM", {"group_size": 32}),
        ("INT4_ASYM", {"group_size": -1, "all_layers": True}),
    ],
)
def test_models_that_nncf_compressed(mode: str, options: dict[str, Any], tmp_path: Path) -> None:
    """They are saved as compressed-tensors, which loads them."""
    model: Any = nncf.compress_weights(
        float_model(torch.float16),
        mode=getattr(nncf.CompressWeightsMode, mode),
        dataset=nncf.Dataset([{"input_ids": IDS}]),
        **options,
    )
    up = model.model.layers[1].mlp.up_proj
    storage = model._modules["__nncf_hooks"].post_hooks._modules["model:layers:1:mlp:up_proj:weight__0"]
    wanted = next(iter(storage.children()))(up.weight)
    before = logits(model)
    sparsify_activations(model, "down=0.5", [IDS])
    assert "__nncf_hooks" not in model._modules and type(up) is QuantizedLinear
    assert torch.equal(up.dequantized(torch.float16), wanted)
    assert model.model.embed_tokens.weight.dtype == torch.float16
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config = config.quantization_config["quantization_config"]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    torch.testing.assert_close(logits(dense), before, rtol=0.02, atol=0.02)


def test_layers_that_share_an_input_run_together(checkpoints: Any) -> None:
    model = read(checkpoints("compressed-tensors int4 asymmetric")[0])
    sparsify_activations(model, "0.5", [IDS])
    block = model.model.layers[0]
    assert hasattr(block.mlp, "scap_formula") and block.self_attn.scap_together
    # The twin of the kernels computes what the layers say of themselves.
    x = torch.randn(1, 1, 64)
    gate, up, down = (block.mlp.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj"))
    for rows in (x, torch.randn(1, 20, 64)):
        with torch.no_grad():
            together = block.mlp(rows)
            hidden = torch.nn.functional.silu(_pruned(gate, rows)) * _pruned(up, rows)
            torch.testing.assert_close(together, _pruned(down, hidden), rtol=1e-4, atol=1e-5)


def _pruned(layer: Any, x: torch.Tensor) -> torch.Tensor:
    kept = torch.where((x - layer.scap_mode).abs() > layer.scap_threshold, x, layer.scap_mode)
    return kept @ layer.dequantized(torch.float32).t()


def test_modes_are_folded_with_the_dequantized_weights(checkpoints: Any) -> None:
    model = read(checkpoints("GPTQ")[0]).float()
    sparsify_activations(model, "down,mean,0.5", [IDS])
    down = model.model.layers[1].mlp.down_proj
    assert down.scap_mode != 0
    wanted = down.scap_mode * down.dequantized().double().sum(dim=1)
    torch.testing.assert_close(down.scap_folded_bias.double(), wanted, rtol=1e-5, atol=1e-6)
    x = torch.randn(1, 1, 128)
    with torch.no_grad():
        torch.testing.assert_close(down(x), _pruned(down, x), rtol=1e-4, atol=1e-5)


def test_other_types_of_activations(checkpoints: Any) -> None:
    """`to`, `half` and the like change activations and biases; scales stay what the checkpoint has."""
    folder, _ = checkpoints("compressed-tensors int4 symmetric")
    model = read(folder)
    sparsify_activations(model, "0.5", [IDS])
    up = model.model.layers[0].mlp.up_proj
    x = torch.randn(1, 20, 64).bfloat16()
    with torch.no_grad():
        expected = up(x.float())
        half = model.to(torch.bfloat16)
        torch.testing.assert_close(up(x).float(), expected, rtol=0.05, atol=0.05)
    assert up.scap_dtype == torch.bfloat16 and up.packed_weights().tensors[1].dtype == torch.float32
    assert logits(half).dtype == torch.bfloat16
    source = tensors_of(folder)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    assert torch.equal(half.state_dict()[name], source[name])


def test_state_dicts_are_loaded_again(checkpoints: Any) -> None:
    first = read(checkpoints("AWQ")[0])
    second = read(checkpoints("AWQ")[0])
    state = first.state_dict()
    name = "model.layers.0.mlp.up_proj.scales"
    state[name] = 2 * state[name]
    second.load_state_dict(state)
    pair = [model.model.layers[0].mlp.up_proj.dequantized() for model in (first, second)]
    assert torch.equal(2 * pair[0], pair[1])
    del state[name]
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        second.load_state_dict(state)


def test_methods_that_are_not_read_are_named() -> None:
    model: Any = float_model()
    model.config.quantization_config = {"quant_method": "hqq"}
    with pytest.raises(SCAPError, match=r"the model is quantized \(hqq\), which is not read"):
        sparsify_activations(model, "0.5", [IDS])


def test_what_pytorch_does_with_a_model(checkpoints: Any) -> None:
    """Copies, pickles, programs that are compiled or traced, and gradients."""
    model = read(checkpoints("compressed-tensors int4 asymmetric")[0])
    sparsify_activations(model, "0.5", [IDS])
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for ids in (IDS, IDS[:1, :1]):
        torch.testing.assert_close(logits(compiled, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    block = model.model.layers[0].mlp
    x = torch.randn(1, 20, 64)
    with torch.no_grad():
        traced = torch.jit.trace(block, x)
        torch.testing.assert_close(traced(x), block(x), rtol=1e-4, atol=1e-5)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0


def test_what_measures_sparse_models_knows_integer_weights(checkpoints: Any, tmp_path: Path) -> None:
    from optimum_scap.evaluation.sparsity import realized_by_torch
    from optimum_scap.evaluation.torch_speed import load
    from optimum_scap.torch.checkpoint import integer_kernel_shapes, kernel_shapes

    folder, _ = checkpoints("GPTQ")
    model = read(folder)
    sparsify_activations(model, "0.5", [IDS])
    model.save_pretrained(tmp_path)
    found = realized_by_torch(model, [IDS])
    assert {layer.weights for layer in found.layers.values()} == {64 * 128}
    assert found.overall == pytest.approx(0.5, abs=0.02)
    assert torch.equal(logits(load(tmp_path, False, torch.device("cpu"))), logits(read(folder)))
    assert torch.equal(logits(load(tmp_path, True, torch.device("cpu"))), logits(model))
    shapes = {(64, (128, 128)), (128, (64,))}
    assert kernel_shapes(tmp_path) == {} and integer_kernel_shapes(tmp_path) == {(4, 32, torch.float16): shapes}


def test_the_body_without_its_head(checkpoints: Any, tmp_path: Path) -> None:
    """Paths of a checkpoint with a head fit a model without one, and one with another head."""
    from transformers import AutoModel, AutoModelForSequenceClassification

    model = read(checkpoints("GPTQ")[0])
    sparsify_activations(model, "0.5", [IDS])
    model.save_pretrained(tmp_path)
    expected = model.model(IDS).last_hidden_state
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(IDS).last_hidden_state, expected)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(other.model(IDS).last_hidden_state, expected)
