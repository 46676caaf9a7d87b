"""Models of well-known shapes with random weights: speed and memory depend on shapes and sparsity alone."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


SHAPES: dict[str, dict[str, int]] = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "mistral-7b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    # the smallest that the kernels of CATS compute right, see gpu_baselines.py
    "small": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8},
}


def random_llama(shape: str, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> LlamaForCausalLM:
    """A Llama of one of SHAPES, or of so many of its layers.

    Weights are scaled so that activations keep their size from layer to layer.
    """
    fields = {"vocab_size": 32000, "max_position_embeddings": 4096, **SHAPES[shape]}
    config = LlamaConfig(**fields | ({} if layers is None else {"num_hidden_layers": layers}))
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device, torch.no_grad():
            model = LlamaForCausalLM(config).eval()
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(std=module.in_features**-0.5)
                elif isinstance(module, nn.Embedding):
                    module.weight.normal_()
    finally:
        torch.set_default_dtype(default)
    return model
