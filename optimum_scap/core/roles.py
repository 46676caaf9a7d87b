"""Which module path plays which role: one table for every architecture and both backends.

A role names what a fully connected layer does inside its block. The table is keyed by the tail of the module path,
compared component by component (`*` is any number), and the longest tail wins: ``attention.output.dense`` is `o`
although ``output.dense`` is `down`. A PyTorch module path (``model.layers.0.mlp.up_proj``) and the node name that the
OpenVINO exporter derives from it (``__module.model.layers.0.mlp.up_proj/aten::linear/MatMul``) give the same role.
"""

import re
from typing import Literal, get_args


Role = Literal["q", "k", "v", "o", "qkv", "up", "gate", "down", "in", "out", "head"]

ROLES: tuple[Role, ...] = get_args(Role)
# What tables call layers of no known role.
OTHER = "other"
FFN_ROLES: tuple[Role, ...] = ("up", "gate", "down")
# Roles whose layers read the same input within a block.
SHARED_INPUTS: tuple[tuple[Role, ...], ...] = (("q", "k", "v"), ("gate", "up"))

# A layer that computes gate and up at once (Phi-3, ChatGLM) plays `up`.
_PATH_TAILS: dict[Role, tuple[str, ...]] = {
    "q": ("q_proj", "query", "attention.q_lin", "SelfAttention.q", "EncDecAttention.q", "wq", "query_proj"),
    "k": ("k_proj", "key", "attention.k_lin", "SelfAttention.k", "EncDecAttention.k", "wk", "key_proj"),
    "v": ("v_proj", "value", "attention.v_lin", "SelfAttention.v", "EncDecAttention.v", "wv", "value_proj"),
    "o": (
        "o_proj",  # Llama, Mistral, Qwen, Gemma
        "self_attn.out_proj",  # OPT, CLIP, Whisper
        "encoder_attn.out_proj",
        "attn.out_proj",  # MPT, GPT-J, GPT-Neo
        "attention.out_proj",
        "self_attn.dense",  # Phi-1, Phi-2
        "self_attention.dense",  # Falcon, BLOOM
        "attention.dense",  # GPT-NeoX
        "attn.c_proj",  # GPT-2
        "attention.output.dense",  # BERT, ViT
        "attention.out_lin",  # DistilBERT
        "SelfAttention.o",  # T5
        "EncDecAttention.o",
        "attention.wo",  # InternLM2
        "attn.Wo",  # ModernBERT
    ),
    "qkv": ("qkv_proj", "query_key_value", "Wqkv", "attn.c_attn", "W_pack", "wqkv", "attn.qkv", "self_attn.qkv"),
    "up": (
        "experts.up",  # mixtures of experts, see `torch.expert_layers`; "*" is a number
        "experts.*.up",
        "up_proj",  # Llama, Mistral, Qwen, Gemma, MPT
        "gate_up_proj",  # Phi-3
        "fc1",  # Phi-1, Phi-2, OPT, CLIP, Whisper
        "fc_in",  # GPT-J
        "mlp.c_fc",  # GPT-2, GPT-Neo
        "dense_h_to_4h",  # Falcon, BLOOM, GPT-NeoX
        "intermediate.dense",  # BERT, ViT
        "ffn.lin1",  # DistilBERT
        "ffn",  # ALBERT
        "feed_forward.intermediate_dense",  # Wav2Vec2
        "DenseReluDense.wi",  # T5
        "DenseReluDense.wi_1",
        "w3",  # LFM2, InternLM2
        "mlp.Wi",  # ModernBERT
        "mlp.weights_in",  # DINOv2 with SwiGLU
    ),
    "gate": ("experts.gate", "experts.*.gate", "gate_proj", "DenseReluDense.wi_0", "w1"),
    "down": (
        "experts.down",
        "experts.*.down",
        "down_proj",
        "fc2",
        "fc_out",
        "mlp.c_proj",
        "dense_4h_to_h",
        "output.dense",
        "ffn.lin2",
        "ffn_output",
        "feed_forward.output_dense",
        "DenseReluDense.wo",
        "w2",
        "mlp.Wo",
        "mlp.weights_out",
    ),
    "in": ("mixer.in_proj", "mamba.in_proj"),
    "out": ("mixer.out_proj", "mamba.out_proj"),
    # What computes the logits: in small models a quarter of all that a token reads, and the most sensitive layer.
    "head": ("lm_head", "embed_out", "output_layer", "proj_out"),  # GPT-NeoX, ChatGLM, Whisper
}

_TAIL_TO_ROLE: dict[tuple[str, ...], Role] = {
    tuple(tail.split(".")): role for role, tails in _PATH_TAILS.items() for tail in tails
}
_LONGEST_TAIL = max(len(tail) for tail in _TAIL_TO_ROLE)

_TRACED_OPERATION = re.compile(r"/(aten|prim|ov_ext|torch|torch_nncf)::")
# What exporters, torch.compile, DataParallel and PEFT put a model into.
_WRAPPERS = re.compile(r"(?:(?:__module|_orig_mod|module|base_model\.model)\.)*")
_ADAPTED = ".base_layer"  # what PEFT puts an adapter around


def module_path(name: str) -> str:
    """The dotted module path behind `name`, which may be a PyTorch module path or the name of an IR node.

    What torch.compile, DataParallel and PEFT put around a model and its layers is left out.
    """
    traced = _TRACED_OPERATION.search(name)
    if traced:
        name = name[: traced.start()]
    elif "/" in name:  # ONNX style: /model/layers.0/mlp/up_proj/MatMul, the last component is the operation
        name = name.strip("/").rpartition("/")[0].replace("/", ".")
    name = _WRAPPERS.sub("", name, count=1)
    while name.endswith(_ADAPTED):  # adapters upon adapters
        name = name.removesuffix(_ADAPTED)
    return name


def find_role(name: str) -> Role | None:
    """The role of the fully connected layer called `name` (a module path or an IR node name), None if it has none."""
    parts = ["*" if part.isdigit() else part for part in module_path(name).split(".")]
    for length in range(min(_LONGEST_TAIL, len(parts)), 0, -1):
        role = _TAIL_TO_ROLE.get(tuple(parts[-length:]))
        if role is not None:
            return role
    return None
