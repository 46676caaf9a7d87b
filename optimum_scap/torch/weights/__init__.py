"""Weight formats: pack, dequantize, multiply. `base` says what a format is; importing one registers it."""

from . import dense  # noqa: F401
from .base import KernelArguments, WeightFormat, Weights, find_format, register


__all__ = ["KernelArguments", "WeightFormat", "Weights", "find_format", "register"]
