"""`--weight-format`: a float model is quantized by NNCF and pruned in one go, and others load the result."""

import json
from pathlib import Path
from typing import Any

import nncf
import pytest
import torch
from command_line import optimum_cli
from quantized_checkpoints import add_tokenizer, float_model, tensors_of
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_scap.torch.linear import SCAPQuantizedLinear
from optimum_scap.torch.quantize import quantize_weights
from optimum_scap.torch.quantized import QuantizedLinear


IDS = torch.arange(3, 99).view(2, 48)


@pytest.mark.parametrize(
    ("weight_format", "group_size", "symmetric", "mode"),
    [
        ("int8", None, False, "INT8_ASYM"),
        ("int8", None, True, "INT8_SYM"),
        ("int4", 32, False, "INT4_ASYM"),
        ("int4", 32, True, "INT4_SYM"),
        ("int4", -1, True, "INT4_SYM"),
    ],
)
def test_weights_are_what_nncf_makes_of_the_whole_model(
    weight_format: Any, group_size: int | None, symmetric: bool, mode: str
) -> None:
    model, whole = float_model(), float_model()
    quantize_weights(model, weight_format, group_size, symmetric)
    options = {} if weight_format == "int8" else {"group_size": group_size, "all_layers": True, "ratio": 1.0}
    nncf.compress_weights(
        whole,
        mode=getattr(nncf.CompressWeightsMode, mode),
        dataset=nncf.Dataset([{"input_ids": IDS}]),
        **options,
    )
    hooks = whole._modules["__nncf_hooks"].post_hooks._modules
    compared = 0
    for path, module in whole.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            decompress = next(iter(hooks[f"{path.replace('.', ':')}:weight__0"].children()))
            wanted = decompress(module.weight).half()
            assert torch.equal(model.get_submodule(path).dequantized(torch.float16), wanted), path
            compared += 1
    assert compared == 14 and type(model.lm_head) is nn.Linear


def test_layers_of_other_models_and_biases() -> None:
    from tiny_models import tiny_model

    model = tiny_model("qwen2")
    bias = model.model.layers[0].self_attn.q_proj.bias.clone()
    quantize_weights(model, "int8")
    layer = model.model.layers[0].self_attn.q_proj
    assert type(layer) is QuantizedLinear and torch.equal(layer.bias, bias)
    assert "model.layers.0.self_attn.q_proj.weight_packed" in model.state_dict()


def test_one_command(tmp_path: Path) -> None:
    """Its result is a compressed-tensors checkpoint, which compressed-tensors itself loads."""
    folder, output = tmp_path / "float", tmp_path / "out"
    float_model(torch.float16).save_pretrained(folder)
    add_tokenizer(folder)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 97}" for i in range(3000)))
    sizes = ("--scap-dataset", tmp_path / "text.txt", "--scap-num-samples", "2", "--scap-seq-len", "16")
    result = optimum_cli(
        *("export", "torch", "-m", folder, "--weight-format", "int4", "--group-size", "32", "--sym"),
        *("--scap", "0.5", *sizes, output),
    )
    assert result.returncode == 0, result.stderr
    sparse = AutoModelForCausalLM.from_pretrained(output)
    assert type(sparse.model.layers[1].mlp.down_proj) is SCAPQuantizedLinear
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    scheme = config["quantization_config"]["config_groups"]["group_0"]
    assert (scheme["weights"]["num_bits"], scheme["weights"]["group_size"]) == (4, 32)
    names = {name.rpartition(".")[2] for name in tensors_of(output)}
    assert names == {"weight", "weight_packed", "weight_scale", "weight_shape"}
    dense_config = AutoConfig.from_pretrained(output)
    dense_config.quantization_config = dense_config.quantization_config["quantization_config"]
    dense = AutoModelForCausalLM.from_pretrained(output, config=dense_config)
    with torch.no_grad():
        dense(IDS)  # compressed-tensors multiplies the weights out before
    for path in ("mlp.up_proj", "self_attn.v_proj"):
        mine, theirs = (model.model.layers[0].get_submodule(path) for model in (sparse, dense))
        assert torch.equal(mine.dequantized(torch.float16), theirs.weight)
