"""Weights of float32, float16 or bfloat16, stored as they are: what compressed-tensors calls `dense`."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import KernelArguments, WeightFormat, Weights, register


class DenseFormat(WeightFormat[Tensor]):
    """One tensor `[out_features, in_features]`, which may lie either way in memory."""

    name = "dense"
    tensor_count = 1

    def pack(self, stored: Tensor) -> Weights:
        return Weights(self.name, (stored.t().contiguous().t(),))

    def unpack(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].contiguous()

    def shape(self, tensors: Sequence[Tensor]) -> tuple[int, int]:
        out_features, in_features = tensors[0].shape
        return out_features, in_features

    def dequantize(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        return tensors[0] if dtype is None else tensors[0].to(dtype)

    def multiply(self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        return F.linear(x, tensors[0], bias)

    def kernel_arguments(self, tensors: Sequence[Tensor], input_major: bool) -> KernelArguments:
        (weight,) = tensors
        out_features, in_features = weight.shape
        if input_major:
            if out_features > 1 and weight.stride(0) != 1 or in_features > 1 and weight.stride(1) < out_features:
                raise ValueError(
                    f"weights must lie input-channel-major, with strides (1, >= {out_features}); got {weight.stride()}"
                )
        elif in_features > 1 and weight.stride(1) != 1 or out_features > 1 and weight.stride(0) < in_features:
            raise ValueError(
                f"weights must lie output-channel-major, with strides (>= {in_features}, 1); got {weight.stride()}"
            )
        return KernelArguments((weight,), (weight.stride(1 if input_major else 0),), (input_major,))


register(DenseFormat())
