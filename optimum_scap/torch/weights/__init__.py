"""Weight formats: pack, dequantize, multiply. `base` says what a format is; importing one registers it."""

from . import dense, packed  # noqa: F401
from .base import KernelArguments, WeightFormat, Weights, find_format, register
from .integers import IntegerWeights


__all__ = ["IntegerWeights", "KernelArguments", "WeightFormat", "Weights", "find_format", "register"]
