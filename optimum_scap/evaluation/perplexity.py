"""Perplexity of a causal language model on plain text."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from ..data.lengths import clamp_length
from ..errors import SCAPError


def perplexity(model: Any, tokenizer: Any, text: str, *, window: int = 512, max_tokens: int | None = None) -> float:
    """exp of the mean negative log-likelihood per predicted token, over windows that do not overlap.

    Args:
        model: a transformers or optimum-intel causal language model.
        tokenizer: its tokenizer; no special tokens are added.
        text: the text; tokenized as a whole.
        window: tokens per window, or as many as the model takes; the first token of each is not predicted.
        max_tokens: use only so many tokens from the beginning.

    Raises:
        SCAPError: if the text holds less than two tokens.
    """
    import torch

    window = clamp_length(window, getattr(model, "config", None), tokenizer)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :max_tokens]
    ids = ids.to(model.device)
    total, count = 0.0, 0
    for start in range(0, ids.shape[1] - 1, window):
        chunk = ids[:, start : start + window]
        if chunk.shape[1] < 2:
            continue
        with torch.no_grad():
            logits = model(input_ids=chunk, attention_mask=torch.ones_like(chunk)).logits
        losses = torch.nn.functional.cross_entropy(logits[0, :-1].float(), chunk[0, 1:], reduction="sum")
        total += float(losses)
        count += chunk.shape[1] - 1
    if count == 0:
        raise SCAPError("the text for perplexity holds less than two tokens")
    return math.exp(total / count)


def token_samples(
    tokenizer: Any, text: str | Path, *, window: int, max_tokens: int | None = None, model: Any = None
) -> list[Any]:
    """Windows of token ids `[1, <= window]` (int64), as `perplexity` cuts them for `model`."""
    window = clamp_length(window, getattr(model, "config", None), tokenizer)
    content = text.read_text(encoding="utf-8") if isinstance(text, Path) else text
    ids = tokenizer(content, add_special_tokens=False)["input_ids"][:max_tokens]
    return [np.array([ids[start : start + window]], dtype=np.int64) for start in range(0, len(ids), window)]
