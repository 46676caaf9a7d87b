"""GGUF files: what the gguf package writes and multiplies out is what is read, bit by bit."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from command_line import optimum_cli_in_process
from gguf import GGMLQuantizationType
from quantized_checkpoints import add_tokenizer, float_model
from transformers import AutoModelForCausalLM

from optimum_scap import SCAPError, sparsify_activations
from optimum_scap.core.config import SCAPConfig
from optimum_scap.folders import export_checkpoint
from optimum_scap.torch.backend import pruned_layers
from optimum_scap.torch.linear import SCAPQuantizedLinear
from optimum_scap.torch.readers.base import LayerShape
from optimum_scap.torch.readers.gguf import EXACT_TYPES, convert_gguf, integers_of
from optimum_scap.torch.weights.integers import dequantize


GENERATOR = np.random.default_rng(0)


def blocks(kind: str, out_features: int, in_features: int) -> Any:
    """Data of a type: what gguf quantizes, or, where it only multiplies out, any bytes with finite scales."""
    quantization = GGMLQuantizationType[kind]
    if kind in ("Q4_0", "Q4_1", "Q8_0"):
        weight = GENERATOR.standard_normal((out_features, in_features)).astype(np.float32)
        return gguf.quantize(weight, quantization)
    channels, size = gguf.GGML_QUANT_SIZES[quantization]
    data = GENERATOR.integers(0, 256, (out_features * in_features // channels, size), dtype=np.uint8)
    halves = {"Q4_K": slice(0, 4), "Q6_K": slice(208, 210)}[kind]
    width = (halves.stop - halves.start) // 2
    data[:, halves] = GENERATOR.standard_normal((len(data), width)).astype(np.float16).view(np.uint8)
    return data.reshape(out_features, -1)


@pytest.mark.parametrize("kind", EXACT_TYPES)
def test_weights_are_bit_by_bit_those_of_the_gguf_package(kind: str) -> None:
    data = blocks(kind, 24, 512)
    weights = integers_of(data, kind, LayerShape("layer", 512, 24))
    assert weights.bits == (8 if kind in ("Q8_0", "Q6_K") else 4)
    np.testing.assert_array_equal(
        dequantize(weights).numpy(), gguf.dequantize(data, GGMLQuantizationType[kind]), strict=True
    )


def write_gguf(file: Path, kinds: dict[str, str]) -> Any:
    """A Llama with a tied head whose layers are of these types; returns the float model. Written as llama.cpp does."""
    model = float_model()
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = value.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        projection = name.split(".")[-2]
        if projection in heads:  # llama.cpp turns neighboring channels, transformers the halves of a head
            array = array.reshape(heads[projection], 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        kind = kinds.get(projection)
        called = names.get_name(name, try_suffixes=(".weight",))
        if kind is None:
            writer.add_tensor(called, np.ascontiguousarray(array, dtype=np.float32))
        else:
            quantization = GGMLQuantizationType[kind]
            writer.add_tensor(called, gguf.quantize(np.ascontiguousarray(array), quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FILES = {
    "Q4_0": dict.fromkeys(LAYERS, "Q4_0"),
    "Q4_1": dict.fromkeys(LAYERS, "Q4_1"),
    "Q8_0": dict.fromkeys(LAYERS, "Q8_0"),
    "mixed": {**dict.fromkeys(LAYERS, "Q4_0"), "v_proj": "Q8_0", "down_proj": "Q5_0"},
}


# Processes of their own: one of each kind of result here.
ONE_OF_A_KIND = [name if name in ("Q4_1", "mixed") else pytest.param(name, marks=pytest.mark.slow) for name in FILES]


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_files_are_exported(name: str, tmp_path: Path) -> None:
    """The layers have the values that transformers' own reader multiplies out, and a fresh process loads them."""
    file, output, text = tmp_path / "model.gguf", tmp_path / "out", tmp_path / "text.txt"
    write_gguf(file, FILES[name])
    output.mkdir()
    add_tokenizer(tmp_path)
    text.write_text(" ".join(f"w{i * i % 97}" for i in range(3000)))
    config = SCAPConfig.from_spec("0.5", dataset=str(text), num_samples=2, seq_len=16)
    export_checkpoint(str(file), output, config, dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    own = AutoModelForCausalLM.from_pretrained(output)
    method = own.config.quantization_config.parameters.quantization_config["quant_method"]
    assert method == ("gguf" if name == "Q4_1" else "compressed-tensors")
    assert type(own.model.layers[0].mlp.up_proj) is SCAPQuantizedLinear
    for path, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear):
            mine = own.get_submodule(path)
            weight = mine.weight if isinstance(mine, torch.nn.Linear) else mine.dequantized()
            assert torch.equal(weight, module.weight), path
    script = (
        "import sys, optimum_scap\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(sum('SCAP' in type(module).__name__ for module in model.modules()))\n"
    )
    result = subprocess.run([sys.executable, "-c", script, output], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.strip() == "6", result.stderr


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    file, output = tmp_path / "model.gguf", tmp_path / "out"
    write_gguf(file, FILES["Q4_0"])
    flags = ("--scap", "0.5", "--scap-dataset", tmp_path / "text.txt", output)
    (tmp_path / "text.txt").write_text("w1 w2 w3 " * 200)
    result = optimum_cli_in_process("export", "torch", "-m", file, *flags)
    assert result.returncode != 0 and "model.gguf: there is no tokenizer.json beside it" in result.stderr
    add_tokenizer(tmp_path)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"no GGUF at all"):
        file.write_bytes(content)
        result = optimum_cli_in_process("export", "torch", "-m", file, *flags)
        assert result.returncode != 0 and f"{file} cannot be read" in result.stderr, result.stderr
        assert not output.exists()


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    model = write_gguf(file, {})
    reader = gguf.GGUFReader(file)
    assert len(reader.tensors) == len(model.state_dict()) - 1
    whole = gguf.GGUFReader.__init__

    def without_one(self: Any, *arguments: Any) -> None:
        whole(self, *arguments)
        self.tensors = [tensor for tensor in self.tensors if tensor.name != "blk.1.ffn_up.weight"]

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(SCAPError, match="lacks 1 weights of a LlamaForCausalLM"),
    ):
        patch.setattr(gguf.GGUFReader, "__init__", without_one)
        (tmp_path / "converted").mkdir()
        convert_gguf(file, tmp_path / "converted", torch.float32)


def test_a_model_whose_weights_transformers_multiplied_out_is_a_float_model() -> None:
    model = float_model()
    model.config.quantization_config = {"quant_method": "gguf"}  # newer versions of transformers leave it there
    sparsify_activations(model, SCAPConfig.from_spec("0.5"), [{"input_ids": torch.arange(3, 40)[None]}])
    assert {type(module).__name__ for module in pruned_layers(model).values()} == {"SCAPLinear"}
