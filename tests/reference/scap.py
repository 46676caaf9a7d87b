# SPDX-License-Identifier: Apache-2.0
"""SCAP in plain float64 numpy.

    d      = x - mode                                                 (float32)
    keep   = not (|d| <= threshold)                                   (float32; NaN is kept)
    linear = where(keep, d, 0) @ W.T + bias
    ffn    = down(activation(gate(x)) * up(x)), each a linear with the threshold of its input

``bias`` already holds ``mode * W.sum(1)`` where the mode is not zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def dequantize(q: np.ndarray, scale: np.ndarray, zero_point: np.ndarray | None, group_size: int = 0) -> np.ndarray:
    """``(q - zero_point) * scale`` in float64, from q ``[out, in]`` and ``[out, groups]`` parameters."""
    group = np.arange(q.shape[1]) // (group_size or q.shape[1])
    zero = 0.0 if zero_point is None else zero_point.astype(np.float64)[:, group]
    return (q.astype(np.float64) - zero) * scale.astype(np.float64)[:, group]


def sparsify(x: np.ndarray, mode: float, threshold: float) -> np.ndarray:
    """``where(|x - mode| > threshold, x - mode, 0)``, compared in float32; float64 out."""
    difference = x.astype(np.float32) - np.float32(mode)
    return np.where(np.abs(difference) <= np.float32(threshold), 0.0, difference.astype(np.float64))


def scap_linear(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, mode: float = 0.0, threshold: float = 0.0
) -> np.ndarray:
    """One sparse layer: x ``[..., in]``, weight ``[out, in]``, bias ``[out]``; returns ``[..., out]``."""
    y = sparsify(x, mode, threshold) @ weight.astype(np.float64).T
    return y if bias is None else y + bias.astype(np.float64)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda x: x,
    "silu": lambda x: x * _sigmoid(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def scap_feed_forward(
    x: np.ndarray,
    weights: list[np.ndarray],
    biases: list[np.ndarray | None],
    activation: str,
    mode: float = 0.0,
    threshold: float = 0.0,
    hidden_mode: float = 0.0,
    hidden_threshold: float = 0.0,
) -> np.ndarray:
    """A whole sparse FFN: ``weights`` and ``biases`` are gate, up, down, or up, down."""
    projected = [scap_linear(x, w, b, mode, threshold) for w, b in zip(weights[:-1], biases[:-1], strict=True)]
    hidden = ACTIVATIONS[activation](projected[0])
    if len(projected) == 2:
        hidden = hidden * projected[1]
    return scap_linear(hidden.astype(np.float32), weights[-1], biases[-1], hidden_mode, hidden_threshold)
