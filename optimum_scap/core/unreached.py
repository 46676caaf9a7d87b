"""What to say when calibration data does not reach a part of the model, as text does not reach a vision tower."""

import re
import shlex
from collections.abc import Sequence
from itertools import takewhile

from ..errors import printable
from .targets import Group


def names_of(layers: Sequence[str]) -> str:
    """The layers of a group for a message: the keys of cross-attention read one input in every block."""
    more = f" and {len(layers) - 4} more" if len(layers) > 4 else ""
    return printable(", ".join(layers[:4]), 1000) + more


def never_reached(unseen: Sequence[Group], groups: Sequence[Group]) -> str:
    """Says which part of the model no sample reached, as the vision tower of a model that is calibrated on text."""
    layers = [path for group in unseen for path in group.layers]
    others = [path for group in groups if group not in unseen for path in group.layers]
    first = printable(layers[0])
    reason = "no activations were seen, the calibration data never reached"
    if not others:
        return f"layer {first}: {reason} it; calibrate on data that the model reads, of which not all is padding"
    part = _part_without(layers, others)
    if part is not None:
        flag = shlex.quote(f"^{re.escape(part)}\\.")
        return (
            f"layer {first}: {reason} it, nor any other of the {len(layers)} layers to prune in {printable(part)}; "
            f"leave them dense with --scap-exclude {printable(flag)} (exclude), or calibrate on data that it reads"
        )
    flags = " ".join(f"--scap-exclude {shlex.quote(f'^{re.escape(path)}$')}" for path in layers[:4])
    more = f" and so on for {len(layers) - 4} more" if len(layers) > 4 else ""
    return (
        f"layer {first}: {reason} it (nor {len(layers) - 1} others); leave such layers dense with "
        f"{printable(flags, 1000)}{more} (exclude), or calibrate on data that reaches them"
    )


def _part_without(layers: Sequence[str], others: Sequence[str]) -> str | None:
    """The largest module that holds all of `layers` and none of `others`."""
    parents = [path.split(".")[:-1] for path in layers]
    common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*parents, strict=False))]
    for depth in range(1, len(common) + 1):
        part = ".".join(common[:depth])
        if not any(path.startswith(f"{part}.") for path in others):
            return part
    return None
