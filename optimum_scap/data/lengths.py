"""How many tokens a model takes: the one place that knows. Knows no framework."""

from typing import Any


# Where a config says it, by what it is called: GPT-2 (n_positions) and others map theirs to the first.
_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_target_positions")
_ENCODER_DECODER_LIMITS = ("max_encoder_position_embeddings", "max_decoder_position_embeddings")
_PARTS = ("text_config", "encoder", "decoder")
# Models that count positions from behind the padding token, so that the table has rows which no token reads.
_POSITIONS_BEHIND_PADDING = frozenset(
    ("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "esm", "ibert")
    + ("layoutlmv3", "lilt", "longformer", "luke", "mluke", "markuplm", "mpnet", "xmod")
    + ("altclip_text_model", "bridgetower_text_model", "clap_text_model")
)
# Tokenizers that know no limit give a number like 10^30.
_NO_LIMIT = 10**9


def longest_sequence(config: Any, tokenizer: Any = None) -> int | None:
    """The number of tokens that a model takes at once, special tokens included; None if there is no limit.

    Args:
        config: the model's configuration, of transformers or of a kind of its own; None if it has none.
        tokenizer: its tokenizer, which may know of a limit that the configuration of an unknown model hides.
    """
    return min([*_limits(config), *_count(tokenizer, "model_max_length")], default=None)


def clamp_length(wanted: int, config: Any, tokenizer: Any = None) -> int:
    """`wanted` tokens, or as many as the model takes if those are fewer."""
    longest = longest_sequence(config, tokenizer)
    return wanted if longest is None else min(wanted, longest)


def _limits(config: Any) -> list[int]:
    found = [limit for name in _LIMITS for limit in _count(config, name)][:1]
    found += [limit for name in _ENCODER_DECODER_LIMITS for limit in _count(config, name)]
    # T5's positions are relative; its config.json may hold a number of positions all the same.
    if getattr(config, "relative_attention_num_buckets", None) and not hasattr(config, "max_position_embeddings"):
        found = []
    if getattr(config, "model_type", None) in _POSITIONS_BEHIND_PADDING:
        padding = getattr(config, "pad_token_id", None)
        found = [limit - 1 - (padding if isinstance(padding, int) else 0) for limit in found]
    for name in _PARTS:
        part = getattr(config, name, None)
        if hasattr(part, "model_type"):
            found += _limits(part)
    return found


def _count(owner: Any, name: str) -> list[int]:
    """The attribute, if it is a number of tokens."""
    value = getattr(owner, name, None)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _NO_LIMIT:
        return []
    return [value]
