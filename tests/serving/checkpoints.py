"""A sparse Llama of 3 layers with all that a checkpoint can have, written with the format's own names."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor

from optimum_scap.torch.readers.base import LayerShape
from optimum_scap.torch.readers.compressed_tensors import packed_config, packed_storage
from optimum_scap.torch.weights import IntegerWeights


HIDDEN, FFN, VOCAB, LAYERS, HEADS, KV_HEADS = 128, 256, 128, 3, 4, 2
SIZES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.v_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, FFN),
    "mlp.up_proj": (HIDDEN, FFN),
    "mlp.down_proj": (FFN, HIDDEN),
}


def quantization_config(layers: dict[str, dict[str, Any]], apply_to: str = "all") -> dict[str, Any]:
    return {
        "quant_method": "scap",
        "version": "0.1.0",
        "config": {"targets": {"up": 0.5}},
        "apply_to": apply_to,
        "layers": layers,
    }


def layer(threshold: float, mode: float = 0.0, tensors: tuple[str, ...] = ()) -> dict[str, Any]:
    estimator = "zero" if mode == 0.0 else "median"
    found = {"estimator": estimator, "target_sparsity": 0.5, "mode": mode, "threshold": threshold}
    return {**found, "tensors": list(tensors)} if tensors else found


def write_checkpoint(folder: Path, apply_to: str = "all", vectors: bool = True) -> Path:
    """q is dense in the second layer; k and v, gate and up have criteria of their own; modes, scales, corrections."""
    torch.manual_seed(3)
    config = tf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=256,
        attention_bias=True,
        mlp_bias=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = tf.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    tiny_tokenizer(VOCAB).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    layers: dict[str, dict[str, Any]] = {}
    for number in range(LAYERS):
        for place, (tail, (inputs, outputs)) in enumerate(SIZES.items()):
            if number == 1 and tail == "self_attn.q_proj":
                continue
            path = f"model.layers.{number}.{tail}"
            wide = 1.0 if inputs == HIDDEN else 0.3
            names = ("bias_correction", "scale") if vectors and place % 2 == 0 and apply_to == "all" else ()
            mode = 0.1 * wide if place in (1, 3, 5, 6) else 0.0
            layers[path] = layer(wide * (0.3 + 0.05 * place), mode, names)
            if names:
                tensors[f"{path}.scap_scale"] = torch.rand(inputs) + 0.5
                tensors[f"{path}.scap_bias_correction"] = 0.1 * torch.randn(outputs)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_config(folder, quantization_config(layers, apply_to))
    return folder


def write_integer_checkpoint(folder: Path) -> Path:
    """`write_checkpoint` with several kinds of integers, but for the second layer; the FFN of the third is dense."""
    write_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    storages, others = {}, ["lm_head"]
    for number in range(LAYERS):
        for tail, (inputs, outputs) in SIZES.items():
            path = f"model.layers.{number}.{tail}"
            if number == 1:
                others.append(path)
                continue
            if number == 2 and tail.startswith("mlp"):
                del config["layers"][path]
                for name in [name for name in tensors if name.startswith(f"{path}.scap_")]:
                    del tensors[name]
            weights = _rounded(tensors.pop(f"{path}.weight"), *_integer_kind(tail))
            storages[path] = packed_storage(LayerShape(path, inputs, outputs), weights)
            for name, tensor in storages[path].write(weights).items():
                tensors[f"{path}.{name}"] = tensor
    config["quantization_config"] = packed_config(storages, others)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_config(folder, config)
    return folder


def _integer_kind(tail: str) -> tuple[int, int | None, bool]:
    """Bits, group size and whether there are zero points."""
    if tail.startswith("self_attn"):
        return {"o_proj": (4, 32, True), "k_proj": (4, None, True)}.get(tail[10:], (8, None, True))
    return (8, 64, False) if tail == "mlp.down_proj" else (4, 32, False)


def _rounded(weight: Tensor, bits: int, group_size: int | None, has_zero_points: bool) -> IntegerWeights:
    outputs, inputs = weight.shape
    grouped = weight.view(outputs, -1, group_size or inputs)
    levels = 1 << bits
    if not has_zero_points:
        scales = grouped.abs().amax(dim=2, keepdim=True) / (levels // 2 - 1)
        integers = (grouped / scales).round().to(torch.int8)
        return IntegerWeights(bits, integers.view(outputs, inputs), scales[:, :, 0].contiguous())
    least, most = (function(dim=2, keepdim=True) for function in (grouped.amin, grouped.amax))
    scales = (most - least) / (levels - 1)
    zero_points = (-least / scales).round().clamp(0, levels - 1)
    integers = (grouped / scales + zero_points).round().clamp(0, levels - 1).to(torch.uint8)
    return IntegerWeights(
        bits,
        integers.view(outputs, inputs),
        scales[:, :, 0].contiguous(),
        zero_points[:, :, 0].to(torch.uint8).contiguous(),
    )


def write_config(folder: Path, fields: dict[str, Any] | None) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = fields
    if fields is None:
        del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
