"""One small model with random weights per family of architectures, and what SCAP has to see in it.

`layers` names every fully connected layer of the model: by the path of what holds them, numbers of blocks being `*`,
the layers there as `name=role`, `-` for a layer that has no role. Layers in one string read one input: a site.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from tiny_models import CONFIGS, FFN, HEADS, HIDDEN, LAYERS, VOCAB, randomize


Layers = Mapping[str, Sequence[str]]
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_SMALL, **_TOKENS, "max_position_embeddings": 256}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": FFN // 2, "head_dim": 12}
_TWO_HEADS = {**_GROUPED, "num_attention_heads": 2}
_IMAGE = {"image_size": 32, "patch_size": 8}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_chunk_size": 16}


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        model: name of the transformers class.
        config: makes its config.
        layers: see the module.
        auto: name of the class that loads its checkpoints.
        inputs: what it reads: `text`, `images`, `both`, `pairs` (an encoder and a decoder) or `speech`.
        exact: whether every layer can hit a target of 0.3; activations that are zero anyway are more than that.
        dense: layers that cannot be pruned, whatever their role.
        sparse: a pattern of the layers that see one token when the model is given one; the others see many.
    """

    model: str
    config: Callable[[], tf.PretrainedConfig]
    layers: Layers
    auto: str = "AutoModelForCausalLM"
    inputs: str = "text"
    exact: bool = True
    dense: Sequence[str] = ()
    sparse: str = ""
    expected: dict[str, str | None] = field(init=False, default_factory=dict)
    sites: set[frozenset[str]] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        for prefix, sites in self.layers.items():
            for site in sites:
                named = dict(pair.split("=") for pair in site.split())
                paths = {f"{prefix}.{name}".strip("."): role for name, role in named.items()}
                self.expected.update({path: None if role == "-" else role for path, role in paths.items()})
                self.sites.add(frozenset(paths))

    def build(self) -> tf.PreTrainedModel:
        """The model, in evaluation mode."""
        torch.manual_seed(0)
        model = randomize(getattr(tf, self.model)(self.config()).eval())
        for path, module in model.named_modules():
            if path.endswith("Attention.q"):  # T5 does not divide the scores: one token would get all of them
                module.weight.data /= 12**0.5
        return model

    def samples(self, count: int = 3) -> list[dict[str, torch.Tensor]]:
        """Inputs for it."""
        generator = torch.Generator().manual_seed(1)
        return [self._sample(generator, 2, 48, 24) for _ in range(count)]

    def one_token(self) -> dict[str, torch.Tensor]:
        """An input of one token, as decoding has it; the encoder of speech and images is given more."""
        return self._sample(torch.Generator().manual_seed(2), 1, 1, 1)

    def _sample(self, generator: torch.Generator, batch: int, tokens: int, decoded: int) -> dict[str, torch.Tensor]:
        def ids(length: int) -> torch.Tensor:
            return torch.randint(3, VOCAB, (batch, length), generator=generator)

        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(batch, *shape, generator=generator)

        if self.inputs == "images":
            batch *= 4  # an image is 17 tokens
            return {"pixel_values": numbers(3, 32, 32)}
        if self.inputs == "both":
            batch *= 4
            return {"input_ids": ids(max(1, tokens // 4)), "pixel_values": numbers(3, 32, 32)}
        if self.inputs == "pairs":
            return {"input_ids": ids(tokens), "decoder_input_ids": ids(decoded)}
        if self.inputs == "speech":
            return {"input_features": numbers(16, 96), "decoder_input_ids": ids(decoded)}
        return {"input_ids": ids(tokens)}


def known(name: str, layers: Layers, **options: Any) -> Family:
    """A family of which `tiny_models` has the config."""
    model, config, _ = CONFIGS[name]
    return Family(model, config, layers, **options)


def gated(prefix: str = "model.layers.*", attention: str = "self_attn", mlp: str = "mlp", head: bool = True) -> Layers:
    """The layers of Llama and all that followed it."""
    layers = {
        f"{prefix}.{attention}": ("q_proj=q k_proj=k v_proj=v", "o_proj=o"),
        f"{prefix}.{mlp}": ("gate_proj=gate up_proj=up", "down_proj=down"),
    }
    return layers | ({"": ("lm_head=head",)} if head else {})


def experts(mlp: str = "mlp", *others: str) -> Layers:
    """The layers of Mixtral and its kin; `others` read what the experts read."""
    return {
        "model.layers.*.self_attn": ("q_proj=q k_proj=k v_proj=v", "o_proj=o"),
        f"model.layers.*.{mlp}": (" ".join(["experts.gate=gate experts.up=up", *others]), "experts.down=down"),
        "": ("lm_head=head",),
    }


def bert(prefix: str, *others: str) -> Layers:
    """The layers of BERT's encoder; `others` are paths of layers without a role."""
    return {
        f"{prefix}.attention.self": ("query=q key=k value=v",),
        prefix: ("attention.output.dense=o", "intermediate.dense=up", "output.dense=down"),
        "": tuple(f"{path}=-" for path in others),
    }


def vit(prefix: str, *others: str) -> Layers:
    layers = bert(prefix, *others)
    return {
        f"{prefix}.attention.attention": layers[f"{prefix}.attention.self"],
        prefix: layers[prefix],
        "": layers[""],
    }


def tower(prefix: str) -> Layers:
    """The layers of a transformer of CLIP, Whisper's encoder and others."""
    return {
        f"{prefix}.self_attn": ("q_proj=q k_proj=k v_proj=v", "out_proj=o"),
        prefix: (*(("mlp.fc1=up", "mlp.fc2=down") if "encoder.layers" in prefix else ("fc1=up", "fc2=down")),),
    }


def neox(prefix: str, attention: str, head: str = "lm_head", parallel: bool = False) -> Layers:
    """The layers of GPT-NeoX, Falcon and BLOOM; in parallel blocks attention and FFN read one input."""
    inputs = (f"{attention}.query_key_value=qkv", "mlp.dense_h_to_4h=up")
    return {
        prefix: (*([" ".join(inputs)] if parallel else inputs), f"{attention}.dense=o", "mlp.dense_4h_to_h=down"),
        "": (f"{head}=head",),
    }


def t5(part: str, ffn: tuple[str, ...]) -> Layers:
    number = 2 if part == "decoder" else 1
    return {
        f"{part}.block.*.layer.*.SelfAttention": ("q=q k=k v=v", "o=o"),
        f"{part}.block.*.layer.*.DenseReluDense": ffn,
    } | ({f"{part}.block.*.layer.*.EncDecAttention": ("q=q", "k=k v=v", "o=o")} if number == 2 else {})


DECODERS = {
    **{name: known(name, gated()) for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")},
    "phi": known(
        "phi",
        {
            "model.layers.*": (
                "self_attn.q_proj=q self_attn.k_proj=k self_attn.v_proj=v mlp.fc1=up",
                "self_attn.dense=o",
                "mlp.fc2=down",
            ),
            "": ("lm_head=head",),
        },
    ),
    "phi3": known(
        "phi3",
        {
            "model.layers.*.self_attn": ("qkv_proj=qkv", "o_proj=o"),
            "model.layers.*.mlp": ("gate_up_proj=up", "down_proj=down"),
            "": ("lm_head=head",),
        },
    ),
    "mpt": known(
        "mpt",
        {
            "transformer.blocks.*.attn": ("Wqkv=qkv", "out_proj=o"),
            "transformer.blocks.*.ffn": ("up_proj=up", "down_proj=down"),
            "": ("lm_head=head",),
        },
    ),
    "falcon": known("falcon", neox("transformer.h.*", "self_attention", parallel=True)),
    "falcon_new": Family(
        "FalconForCausalLM",
        lambda: tf.FalconConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_kv_heads=2,
            new_decoder_architecture=True,
            bos_token_id=1,
        ),
        neox("transformer.h.*", "self_attention"),
    ),
    "gpt_neox": known("gpt_neox", neox("gpt_neox.layers.*", "attention", "embed_out")),
    "opt": known("opt", {**tower("model.decoder.layers.*"), "": ("lm_head=head",)}, exact=False),
    "gpt2": known(
        "gpt2",
        {
            "transformer.h.*": ("attn.c_attn=qkv", "attn.c_proj=o", "mlp.c_fc=up", "mlp.c_proj=down"),
            "": ("lm_head=head",),
        },
    ),
    "bloom": known("bloom", neox("transformer.h.*", "self_attention")),
    "stablelm": Family("StableLmForCausalLM", lambda: tf.StableLmConfig(**_TWO_HEADS), gated()),
    "granite": Family("GraniteForCausalLM", lambda: tf.GraniteConfig(**_GROUPED), gated()),
    "olmo2": Family("Olmo2ForCausalLM", lambda: tf.Olmo2Config(**_GROUPED), gated()),
    "smollm3": Family("SmolLM3ForCausalLM", lambda: tf.SmolLM3Config(**_GROUPED), gated()),
}

STATE_SPACE = {
    "mamba": Family(
        "MambaForCausalLM",
        lambda: tf.MambaConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, state_size=8, **_TOKENS
        ),
        {
            "backbone.layers.*.mixer": ("in_proj=in", "x_proj=-", "dt_proj=-", "out_proj=out"),
            "": ("lm_head=head",),
        },
    ),
    "mamba2": Family(
        "Mamba2ForCausalLM",
        lambda: tf.Mamba2Config(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            state_size=16,
            num_heads=8,
            head_dim=12,
            n_groups=1,
            chunk_size=16,
            **_TOKENS,
        ),
        {"backbone.layers.*.mixer": ("in_proj=in", "out_proj=out"), "": ("lm_head=head",)},
    ),
    "bamba": Family(
        "BambaForCausalLM",
        lambda: tf.BambaConfig(**_GROUPED, **_MAMBA, attn_layer_indices=[1]),
        {**gated(mlp="feed_forward"), "model.layers.*.mamba": ("in_proj=in", "out_proj=out")},
    ),
}

ENCODERS = {
    "bert": known(
        "bert",
        bert("bert.encoder.layer.*", "bert.pooler.dense", "classifier"),
        auto="AutoModelForSequenceClassification",
    ),
    "roberta": Family(
        "RobertaForSequenceClassification",
        lambda: tf.RobertaConfig(**_DECODER),
        bert("roberta.encoder.layer.*", "classifier.dense", "classifier.out_proj"),
        auto="AutoModelForSequenceClassification",
    ),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        lambda: tf.DistilBertConfig(vocab_size=VOCAB, dim=HIDDEN, hidden_dim=FFN, n_layers=LAYERS, n_heads=HEADS),
        {
            "distilbert.transformer.layer.*.attention": ("q_lin=q k_lin=k v_lin=v", "out_lin=o"),
            "distilbert.transformer.layer.*.ffn": ("lin1=up", "lin2=down"),
            "": ("vocab_transform=-", "vocab_projector=-"),
        },
        auto="AutoModelForMaskedLM",
    ),
    "modernbert": Family(
        "ModernBertForMaskedLM",
        lambda: tf.ModernBertConfig(**_DECODER, cls_token_id=1, sep_token_id=2),
        {
            "model.layers.*.attn": ("Wqkv=qkv", "Wo=o"),
            "model.layers.*.mlp": ("Wi=up", "Wo=down"),
            "": ("head.dense=-", "decoder=-"),
        },
        auto="AutoModelForMaskedLM",
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        lambda: tf.T5Config(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=12,
            d_ff=FFN,
            num_layers=LAYERS,
            num_heads=HEADS,
            decoder_start_token_id=0,
        ),
        {**t5("encoder", ("wi=up", "wo=down")), **t5("decoder", ("wi=up", "wo=down")), "": ("lm_head=head",)},
        auto="AutoModelForSeq2SeqLM",
        inputs="pairs",
        exact=False,
    ),
    "t5_gated": Family(
        "T5ForConditionalGeneration",
        lambda: tf.T5Config(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=12,
            d_ff=FFN,
            num_layers=LAYERS,
            num_heads=HEADS,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
        ),
        {
            **t5("encoder", ("wi_0=gate wi_1=up", "wo=down")),
            **t5("decoder", ("wi_0=gate wi_1=up", "wo=down")),
            "": ("lm_head=head",),
        },
        auto="AutoModelForSeq2SeqLM",
        inputs="pairs",
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        lambda: tf.WhisperConfig(
            vocab_size=VOCAB,
            num_mel_bins=16,
            d_model=HIDDEN,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=FFN,
            decoder_ffn_dim=FFN,
            max_source_positions=48,
            max_target_positions=64,
            decoder_start_token_id=1,
            begin_suppress_tokens=None,
            **_TOKENS,
        ),
        {
            "model.encoder.layers.*.self_attn": ("q_proj=q k_proj=k v_proj=v", "out_proj=o"),
            "model.encoder.layers.*": ("fc1=up", "fc2=down"),
            **tower("model.decoder.layers.*"),
            "model.decoder.layers.*.encoder_attn": ("q_proj=q", "k_proj=k v_proj=v", "out_proj=o"),
            "": ("proj_out=head",),
        },
        auto="AutoModelForSpeechSeq2Seq",
        inputs="speech",
        sparse=r"decoder(?!.*encoder_attn.[kv]_proj)|proj_out",
    ),
}

_DINO_ATTENTION = ("attention.query=q attention.key=k attention.value=v", "output.dense=o")
_VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    **_IMAGE,
}
_TEXT = {**_DECODER, "max_position_embeddings": 48}
VISION = {
    "vit": known(
        "vit", vit("vit.encoder.layer.*", "classifier"), auto="AutoModelForImageClassification", inputs="images"
    ),
    "deit": Family(
        "DeiTForImageClassification",
        lambda: tf.DeiTConfig(**_VISION),
        vit("deit.encoder.layer.*", "classifier"),
        auto="AutoModelForImageClassification",
        inputs="images",
    ),
    "dinov2": Family(
        "Dinov2ForImageClassification",
        lambda: tf.Dinov2Config(
            hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, mlp_ratio=2, **_IMAGE
        ),
        {
            "dinov2.encoder.layer.*.attention": (
                "attention.query=q attention.key=k attention.value=v",
                "output.dense=o",
            ),
            "dinov2.encoder.layer.*.mlp": ("fc1=up", "fc2=down"),
            "": ("classifier=-",),
        },
        auto="AutoModelForImageClassification",
        inputs="images",
    ),
    "dinov2_swiglu": Family(
        "Dinov2ForImageClassification",
        lambda: tf.Dinov2Config(
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            mlp_ratio=2,
            use_swiglu_ffn=True,
            **_IMAGE,
        ),
        {
            "dinov2.encoder.layer.*.attention": (
                "attention.query=q attention.key=k attention.value=v",
                "output.dense=o",
            ),
            "dinov2.encoder.layer.*.mlp": ("weights_in=up", "weights_out=down"),
            "": ("classifier=-",),
        },
        auto="AutoModelForImageClassification",
        inputs="images",
    ),
    "swin": Family(
        "SwinForImageClassification",
        lambda: tf.SwinConfig(
            image_size=32, patch_size=2, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4, mlp_ratio=2.0
        ),
        {
            "swin.encoder.layers.*.blocks.*.attention.self": ("query=q key=k value=v",),
            "swin.encoder.layers.*.blocks.*": (
                "attention.output.dense=o",
                "intermediate.dense=up",
                "output.dense=down",
            ),
            "swin.encoder.layers.*": ("downsample.reduction=-",),
            "": ("classifier=-",),
        },
        auto="AutoModelForImageClassification",
        inputs="images",
    ),
    "clip": Family(
        "CLIPModel",
        lambda: tf.CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=HIDDEN),
        {
            **tower("text_model.encoder.layers.*"),
            **tower("vision_model.encoder.layers.*"),
            "": ("visual_projection=-", "text_projection=-"),
        },
        auto="AutoModel",
        inputs="both",
        sparse="^text_model",
    ),
    "siglip": Family(
        "SiglipModel",
        lambda: tf.SiglipConfig(text_config=_TEXT, vision_config=_VISION),
        {
            **tower("text_model.encoder.layers.*"),
            **tower("vision_model.encoder.layers.*"),
            "vision_model.head": ("mlp.fc1=up", "mlp.fc2=down"),
            "text_model": ("head=-",),
            "vision_model.head.attention": ("out_proj=o",),
        },
        auto="AutoModel",
        inputs="both",
        dense=("vision_model.head.attention.out_proj",),
        sparse=r"^text_model|\.head\.",
    ),
}

_SHARED = ("shared_expert.gate_proj=gate", "shared_expert.up_proj=up", "shared_expert_gate=-")
EXPERTS = {
    "mixtral": Family("MixtralForCausalLM", lambda: tf.MixtralConfig(**_GROUPED, num_local_experts=4), experts()),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        lambda: tf.Qwen2MoeConfig(**_GROUPED, **_EXPERTS, shared_expert_intermediate_size=FFN),
        {**experts("mlp", *_SHARED), "model.layers.*.mlp.shared_expert": ("down_proj=down",)},
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", lambda: tf.Qwen3MoeConfig(**_GROUPED, **_EXPERTS), experts()),
    "olmoe": Family(
        "OlmoeForCausalLM", lambda: tf.OlmoeConfig(**_GROUPED, num_experts=4, num_experts_per_tok=2), experts()
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        lambda: tf.DeepseekV3Config(
            **{**_DECODER, "num_key_value_heads": HEADS},
            moe_intermediate_size=FFN // 2,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=24,
            kv_lora_rank=24,
            qk_rope_head_dim=12,
            qk_nope_head_dim=12,
            v_head_dim=12,
        ),
        {
            "model.layers.*.self_attn": ("q_a_proj=- kv_a_proj_with_mqa=-", "q_b_proj=-", "kv_b_proj=-", "o_proj=o"),
            "model.layers.*.mlp": (
                "gate_proj=gate up_proj=up",
                "down_proj=down",
                "experts.gate=gate experts.up=up",
                "experts.down=down",
                "shared_experts.gate_proj=gate shared_experts.up_proj=up",
                "shared_experts.down_proj=down",
            ),
            "": ("lm_head=head",),
        },
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        lambda: tf.GptOssConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2, head_dim=12),
        {
            **experts(),
            "model.layers.*.mlp": ("experts.up=up", "experts.down=down"),
        },
        sparse="^(?!.*experts)",
    ),
}

FAMILIES = DECODERS | EXPERTS | STATE_SPACE | ENCODERS | VISION
