"""Calibration text from the data sets that optimum's helper knows by name, for a model of any framework."""

import re
from typing import Any

from ..errors import SCAPError, first_line, raise_interruption_behind
from .lengths import clamp_length


# The first three are those of optimum.gptq.data, gsm8k is what optimum-intel adds to them.
TEXT_DATASETS = ("c4", "c4-new", "gsm8k", "wikitext2")


def split_name(name: str) -> tuple[str, int | None]:
    """`wikitext2:seq_len=128` as the name of the data set and the number of tokens, None if it is not given.

    Raises:
        SCAPError: if something else follows the colon.
    """
    dataset, colon, options = name.partition(":")
    given = re.fullmatch(r"\s*seq_len\s*=\s*(\d{1,9})\s*", options)
    if colon and given is None:
        raise SCAPError(f"dataset {name!r}: expected NAME or NAME:seq_len=TOKENS")
    return dataset, None if given is None else int(given[1])


def with_length(name: str, seq_len: int, model_config: Any, tokenizer: Any) -> str:
    """The name of a data set with the length of its samples, no longer than the model takes."""
    try:
        dataset, given = split_name(name)
    except SCAPError:
        return name  # the helper says what is wrong with it
    return f"{dataset}:seq_len={clamp_length(given or seq_len, model_config, tokenizer)}"


def named_windows(name: str, tokenizer: Any, num_samples: int, seq_len: int, seed: int) -> list[dict[str, Any]]:
    """Windows of tokens, torch tensors `[1, tokens]` by input name.

    Args:
        name: one of TEXT_DATASETS.
        tokenizer: the model's.
        num_samples: how many windows.
        seq_len: tokens of each; questions of gsm8k are as long as they are, and cut there.
        seed: of the random choice of windows.

    Raises:
        SCAPError: if the data set cannot be loaded, as without a network.
    """
    try:
        if name == "gsm8k":
            from datasets import load_dataset

            rows = load_dataset("openai/gsm8k", "main", split="train").shuffle(seed=seed).select(range(num_samples))
            texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
            return [dict(tokenizer(text, return_tensors="pt", truncation=True, max_length=seq_len)) for text in texts]
        from optimum.gptq.data import get_dataset

        windows = get_dataset(name, tokenizer, nsamples=num_samples, seqlen=seq_len, seed=seed % 2**32)
        return [dict(window) for window in windows]
    except Exception as error:
        # What a missing network raises depends on the versions of datasets, huggingface_hub and httpx.
        raise_interruption_behind(error)
        raise SCAPError(
            f"calibration dataset {name!r} could not be loaded: {first_line(error)}; without network use a local "
            ".txt, .jsonl, .json or .parquet file, or auto"
        ) from error
