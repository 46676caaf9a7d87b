"""Presets: names for what to learn and how long. The method as published learns nothing."""

from collections.abc import Mapping
from typing import Any, Literal, get_args


Preset = Literal["published", "balanced", "quality"]
PRESETS: tuple[Preset, ...] = get_args(Preset)

_FIELDS: dict[Preset, Mapping[str, Any]] = {
    "published": {},
    # Minutes on a CPU for a small model; weights of any format.
    "balanced": {"learn": ("thresholds", "biases"), "learn_steps": 100, "learn_samples": 256, "learn_tokens": 1024},
    # For a GPU; floating-point weights.
    "quality": {
        "learn": ("thresholds", "biases", "gains"),
        "learn_steps": 600,
        "learn_samples": 1024,
        "learn_tokens": 4096,
    },
}


def preset_fields(preset: Preset) -> dict[str, Any]:
    """The fields of SCAPConfig that `preset` stands for."""
    return dict(_FIELDS[preset])
