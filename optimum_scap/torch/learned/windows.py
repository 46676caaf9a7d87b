"""Token sequences to learn from, without padding, and a part of them to stop by."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.samples import as_array, describe_sample, inputs_of
from ...errors import SCAPError


HELD_OUT = 1 / 8
_SHORTEST = 2


def token_sequences(samples: Iterable[Any]) -> list[Tensor]:
    """The sequences of all samples, int64 `[tokens]`; padding is left out.

    Raises:
        SCAPError: if a sample holds no token ids.
    """
    found = []
    for sample in samples:
        inputs = inputs_of(sample)
        ids = inputs.get("input_ids") if isinstance(inputs, dict) else inputs[0]
        rows = None if ids is None else as_array(ids)
        if rows is None or rows.ndim != 2 or rows.dtype.kind not in "iu":
            raise SCAPError(
                f"learning reads token ids (input_ids); the calibration sample is {describe_sample(sample)}"
            )
        mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
        masks = np.ones(rows.shape, dtype=bool) if mask is None else as_array(mask).astype(bool)
        if masks.shape != rows.shape:
            raise SCAPError("learning reads attention masks of one value per token")
        for row, kept in zip(rows, masks, strict=True):
            if kept.sum() >= _SHORTEST:
                found.append(torch.from_numpy(row[kept].astype(np.int64)))
    return found


def split(sequences: Sequence[Tensor], most_tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """(to learn from, held out): the last part of the text, but for what is more than `most_tokens`.

    Raises:
        SCAPError: if there are less than two.
    """
    if len(sequences) < 2:
        raise SCAPError("learning needs two samples at least, one of which is held out; give more text")
    count = max(1, int(len(sequences) * HELD_OUT))
    held_out: list[Tensor] = []
    for sequence in sequences[-count:]:
        if held_out and sum(map(len, held_out)) + len(sequence) > most_tokens:
            break
        held_out.append(sequence)
    return list(sequences[:-count]), held_out


def draw_steps(sequences: Sequence[Tensor], tokens: int, seed: int) -> Iterator[list[Tensor]]:
    """For ever, sequences of at least `tokens` tokens together; all of them once before any comes again."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    step: list[Tensor] = []
    while True:
        for index in torch.randperm(len(sequences), generator=generator, device="cpu").tolist():
            step.append(sequences[index])
            if sum(map(len, step)) >= tokens:
                yield step
                step = []


def batches(sequences: Iterable[Tensor], tokens: int) -> list[Tensor]:
    """`[batch, length]` of sequences of one length, of at most `tokens` tokens, or one longer sequence."""
    by_length: dict[int, list[Tensor]] = {}
    for sequence in sequences:
        by_length.setdefault(len(sequence), []).append(sequence)
    found = []
    for length, rows in by_length.items():
        at_once = max(1, tokens // length)
        found += [torch.stack(rows[start : start + at_once]) for start in range(0, len(rows), at_once)]
    return found
