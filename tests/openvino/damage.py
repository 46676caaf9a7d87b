"""Damages files as disks, transfers and editors do, the same way for the same seed."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np


Damage = Callable[[bytes, np.random.Generator], bytes]


def truncated(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(len(content))]


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
    """1 to 32 bits are another value."""
    damaged = bytearray(content)
    for _ in range(2 ** rng.integers(6)):
        damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def overwritten(content: bytes, rng: np.random.Generator) -> bytes:
    """A run of bytes is random, as where a block of a disk is another file's."""
    begin = int(rng.integers(len(content)))
    length = min(int(rng.integers(1, 4096)), len(content) - begin)
    return content[:begin] + rng.bytes(length) + content[begin + length :]


def swapped_attributes(content: bytes, rng: np.random.Generator) -> bytes:
    """Two attributes of one of the C++ operations have each other's value."""
    layers = list(re.finditer(rb'version="optimum_scap">\s*<data ([^>]*)/>', content))
    layer = layers[rng.integers(len(layers))]
    values = list(re.finditer(rb'="([^"]*)"', layer[1]))
    first, second = sorted(rng.choice(len(values), 2, replace=False))
    (a, b), (c, d) = values[first].span(1), values[second].span(1)
    text = layer[1]
    text = text[:a] + text[c:d] + text[b:c] + text[a:b] + text[d:]
    return content[: layer.start(1)] + text + content[layer.end(1) :]


def changed_digits(content: bytes, rng: np.random.Generator) -> bytes:
    """A digit of a C++ operation's part of the XML is another one."""
    layers = list(re.finditer(rb'version="optimum_scap">.*?</layer>', content, re.DOTALL))
    layer = layers[rng.integers(len(layers))]
    digits = [match.start() for match in re.finditer(rb"\d", layer[0])]
    at = layer.start() + digits[rng.integers(len(digits))]
    return content[:at] + str(rng.integers(10)).encode() + content[at + 1 :]


def damage_file(path: Path, damage: Damage, seed: int) -> None:
    path.write_bytes(damage(path.read_bytes(), np.random.default_rng(seed)))
