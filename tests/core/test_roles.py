import pytest

from optimum_scap.core.roles import find_role, module_path


ARCHITECTURES = {
    "llama": {"model.layers.0.self_attn.q_proj": "q", "model.layers.0.mlp.gate_proj": "gate", "lm_head": "head"},
    "gpt_neox_head": {"embed_out": "head"},
    "mistral": {"model.layers.31.self_attn.o_proj": "o", "model.layers.31.mlp.down_proj": "down"},
    "qwen3": {"model.layers.3.self_attn.k_proj": "k", "model.layers.3.mlp.up_proj": "up"},
    "gemma3": {"model.language_model.layers.3.mlp.up_proj": "up"},
    "phi": {
        "model.layers.0.self_attn.dense": "o",
        "model.layers.0.mlp.fc1": "up",
        "model.layers.0.mlp.fc2": "down",
    },
    "phi3": {"model.layers.0.self_attn.qkv_proj": "qkv", "model.layers.0.mlp.gate_up_proj": "up"},
    "mpt": {
        "transformer.blocks.0.attn.Wqkv": "qkv",
        "transformer.blocks.0.attn.out_proj": "o",
        "transformer.blocks.0.ffn.up_proj": "up",
        "transformer.blocks.0.ffn.down_proj": "down",
    },
    "falcon": {
        "transformer.h.0.self_attention.query_key_value": "qkv",
        "transformer.h.0.self_attention.dense": "o",
        "transformer.h.0.mlp.dense_h_to_4h": "up",
        "transformer.h.0.mlp.dense_4h_to_h": "down",
    },
    "gpt_neox": {"gpt_neox.layers.0.attention.dense": "o", "gpt_neox.layers.0.mlp.dense_h_to_4h": "up"},
    "opt": {
        "model.decoder.layers.0.self_attn.out_proj": "o",
        "model.decoder.layers.0.fc1": "up",
        "model.decoder.layers.0.fc2": "down",
    },
    "gpt2": {
        "transformer.h.0.attn.c_attn": "qkv",
        "transformer.h.0.attn.c_proj": "o",
        "transformer.h.0.mlp.c_fc": "up",
        "transformer.h.0.mlp.c_proj": "down",
    },
    "bert": {
        "bert.encoder.layer.0.attention.self.query": "q",
        "bert.encoder.layer.0.attention.output.dense": "o",
        "bert.encoder.layer.0.intermediate.dense": "up",
        "bert.encoder.layer.0.output.dense": "down",
    },
    "albert": {
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn": "up",
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output": "down",
    },
    "wav2vec2": {
        "wav2vec2.encoder.layers.0.feed_forward.intermediate_dense": "up",
        "wav2vec2.encoder.layers.0.feed_forward.output_dense": "down",
    },
    "deberta-v2": {"deberta.encoder.layer.0.attention.self.query_proj": "q"},
    "mamba2": {"backbone.layers.0.mixer.in_proj": "in", "backbone.layers.0.mixer.out_proj": "out"},
}
ROLES_OF_PATHS = [(path, role) for paths in ARCHITECTURES.values() for path, role in paths.items()]


@pytest.mark.parametrize(("path", "role"), ROLES_OF_PATHS)
def test_a_torch_path_and_its_node_in_the_ir_have_the_same_role(path: str, role: str) -> None:
    assert find_role(path) == role
    for operation in ("aten::linear/MatMul", "ov_ext::linear/MatMul", "aten::addmm/MatMul_1"):
        assert find_role(f"__module.{path}/{operation}") == role
        assert module_path(f"__module.{path}/{operation}") == path


@pytest.mark.parametrize(
    "path",
    [
        "model.embed_tokens",
        "model.layers.0.mlp.gate",
        "my_up_proj",
        "model.layers.0.mlp.up_proj.lora_A",
        "",
    ],
)
def test_other_layers_have_no_role(path: str) -> None:
    assert find_role(path) is None


def test_onnx_and_wrapped_names() -> None:
    assert module_path("/model/layers.0/mlp/up_proj/MatMul") == "model.layers.0.mlp.up_proj"
    assert module_path("_orig_mod.model.layers.0.mlp.up_proj") == "model.layers.0.mlp.up_proj"


def test_layers_in_adapters_are_known_by_their_own_names() -> None:
    path = "base_model.model.model.layers.0.mlp.up_proj.base_layer"
    for name in (path, f"__module.{path}/aten::linear/MatMul", f"{path}.base_layer", f"module._orig_mod.{path}"):
        assert find_role(name) == "up"
    assert module_path(f"__module.{path}/aten::linear/MatMul") == "model.layers.0.mlp.up_proj"
    assert module_path(f"module._orig_mod.{path}.base_layer") == "model.layers.0.mlp.up_proj"
    assert find_role("base_layer") is None and find_role("up_proj.base_layer.lora_A") is None
