"""Small quantized checkpoints: those that a format's own tools write here, and GPTQ's and AWQ's by their layouts.

The layouts are written element by element from their descriptions (AutoGPTQ's and AutoAWQ's modules), not with what is
tested.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_models import word_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


GROUP_SIZE = 32


def float_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama whose layers are wide enough for groups of 32 and packs of 8."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=2.0 / max(parameter.shape) ** 0.5)
    model.model.embed_tokens.weight.data.normal_()
    for parameter in model.parameters():  # not the tables of rotary embeddings, which stay float32 when it is loaded
        parameter.data = parameter.data.to(dtype)
    return model


def write_compressed_tensors(folder: Path, bits: int, symmetric: bool, group_size: int | None, form: str) -> None:
    """By compressed-tensors itself."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model: Any = float_model()
    arguments = QuantizationArgs(
        num_bits=bits,
        type="int",
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
        symmetric=symmetric,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format=form)
    )
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        groups = module.weight.detach().unflatten(1, (-1, group_size or module.in_features))
        scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
        module.weight_scale.data.copy_(scale)
        if not symmetric:
            module.weight_zero_point.data.copy_(zero_point)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def write_torchao(folder: Path, config: Any) -> None:
    """By transformers and torchao."""
    from transformers import TorchAoConfig

    float_model(torch.bfloat16).save_pretrained(folder / "float")
    quantized = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=TorchAoConfig(config))
    quantized.save_pretrained(folder)


def round_to_nearest(weight: torch.Tensor, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q `[out, in]` from 0 on, scales float16 `[out, groups]`, zero points `[out, groups]`."""
    values = weight.detach().double().numpy().reshape(weight.shape[0], -1, GROUP_SIZE)
    most = 2**bits - 1
    if symmetric:
        scales = np.abs(values).max(axis=-1) / (most / 2)
        zero_points = np.full(scales.shape, 2 ** (bits - 1))
    else:
        low, high = np.minimum(values.min(axis=-1), 0), np.maximum(values.max(axis=-1), 0)
        scales = (high - low) / most
        zero_points = np.clip(np.round(-low / scales), 0, most)
    scales = scales.astype(np.float16)
    integers = np.clip(np.round(values / scales[..., None]) + zero_points[..., None], 0, most)
    return integers.reshape(weight.shape).astype(np.int64), scales, zero_points.astype(np.int64)


def int32(rows: int, columns: int, bit_fields: Callable[[int, int], list[tuple[int, int]]]) -> torch.Tensor:
    """Words; `bit_fields` gives (value, lowest bit) of what each holds."""
    words = np.zeros((rows, columns), dtype=np.uint32)
    for row in range(rows):
        for column in range(columns):
            word = 0
            for value, place in bit_fields(row, column):
                word |= int(value) << place
            words[row, column] = word
    return torch.from_numpy(words.view(np.int32))


def gptq_tensors(weight: torch.Tensor, bits: int, symmetric: bool, less: int, order: Any = None) -> dict[str, Any]:
    """The tensors of a layer as AutoGPTQ's QuantLinear packs them, and under "" what they stand for, in float64."""
    q, scales, zeros = round_to_nearest(weight, bits, symmetric)
    (out_features, in_features), per_word = q.shape, 32 // bits
    groups = np.arange(in_features) // GROUP_SIZE if order is None else order
    if not symmetric:
        zeros[::5, ::2] = 0  # which borrow from their neighbors in the first version
    ones = sum(less << place for place in range(0, 32, bits))
    qzeros = int32(
        in_features // GROUP_SIZE,
        out_features // per_word,
        lambda row, column: [(zeros[column * per_word + n, row], n * bits) for n in range(per_word)],
    )
    return {
        "qweight": int32(
            in_features // per_word,
            out_features,
            lambda row, column: [(q[column, row * per_word + n], n * bits) for n in range(per_word)],
        ),
        "qzeros": torch.from_numpy((qzeros.numpy().view(np.uint32) - np.uint32(ones)).view(np.int32)),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
        "": (q - zeros[:, groups]) * scales[:, groups].astype(np.float64),
    }


def awq_tensors(weight: torch.Tensor) -> dict[str, Any]:
    """The tensors of a layer as AutoAWQ's WQLinear_GEMM packs them, and under "" what they stand for, in float64."""
    q, scales, zeros = round_to_nearest(weight, 4, symmetric=False)
    out_features, in_features = q.shape
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    groups = np.arange(in_features) // GROUP_SIZE
    return {
        "qweight": int32(
            in_features,
            out_features // 8,
            lambda row, column: [(q[column * 8 + order[n], row], 4 * n) for n in range(8)],
        ),
        "qzeros": int32(
            in_features // GROUP_SIZE,
            out_features // 8,
            lambda row, column: [(zeros[column * 8 + order[n], row], 4 * n) for n in range(8)],
        ),
        "scales": torch.from_numpy(scales.T.copy()),
        "": (q - zeros[:, groups]) * scales[:, groups].astype(np.float64),
    }


def write_layout(
    folder: Path, config: dict[str, Any], pack: Callable[[torch.Tensor], dict[str, Any]]
) -> dict[str, Any]:
    """A checkpoint with the layers of the blocks as `pack` stores them; returns what those stand for, by path."""
    model = float_model(torch.float16)
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    meant = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            packed = pack(module.weight)
            meant[path] = packed.pop("")
            del tensors[f"{path}.weight"]
            tensors.update({f"{path}.{name}": value for name, value in packed.items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.dtype = "float16"
    fields = {**model.config.to_dict(), "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(fields))
    return meant


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP_SIZE, "zero_point": True, "version": "gemm"}


def write_gptq(folder: Path, **changes: Any) -> dict[str, Any]:
    config = {**GPTQ, **changes}
    less = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    return write_layout(folder, config, lambda weight: gptq_tensors(weight, config["bits"], config["sym"], less))


def write_awq(folder: Path) -> dict[str, Any]:
    return write_layout(folder, AWQ, awq_tensors)


def add_tokenizer(folder: Path) -> None:
    """What an export from a folder needs besides."""
    word_tokenizer(128).save_pretrained(folder)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found
