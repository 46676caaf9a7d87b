"""A random Llama of two layers, exported and half sparse, for tests that need a folder as users have it."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_scap import OVModelForCausalLM, sparsify_activations


def write_sparse_llama(folder: Path) -> Path:
    """The folder in `folder` that holds the sparse IR, with float weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    dense = LlamaForCausalLM(config)
    for parameter in dense.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    dense.save_pretrained(folder / "dense")
    model = OVModelForCausalLM.from_pretrained(folder / "dense", export=True, compile=False)
    ids = torch.randint(99, (1, 64))
    sparsify_activations(model, "0.5", [model.prepare_inputs(ids, torch.ones_like(ids))])
    model.save_pretrained(folder / "sparse")
    return folder / "sparse"
