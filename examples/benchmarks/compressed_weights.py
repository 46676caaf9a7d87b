"""Layers of compressed weights, as NNCF writes them into an `ov.Model`."""

import numpy as np
import openvino as ov
from openvino import opset13 as opset


def compressed_linear(x: ov.Node, stored: np.ndarray, scales: np.ndarray, out_features: int, bits: int) -> ov.Node:
    """A fully connected layer, in the pattern that OpenVINO's CPU plugin turns into one compressed operation.

    Args:
        x: float32 `[..., in_features]`.
        stored: the weights in row order, uint8: one to a byte of 8 bits; of 4 bits two, the low nibble first. The
            model points to this array: it must live as long as the model.
        scales: float16 `[out_features, groups of input channels]`.
        out_features: rows of the weights.
        bits: 8 or 4; 2^(bits - 1) stands for 0.
    """
    in_features = stored.size * 8 // bits // out_features
    by_group = [*scales.shape, in_features // scales.shape[1]]
    kind = ov.Type.u4 if bits == 4 else ov.Type.u8
    weights: ov.Node
    if scales.shape[1] == 1:
        weights = ov.op.Constant(ov.Tensor(stored, [out_features, in_features], kind))
    else:
        weights, scales = ov.op.Constant(ov.Tensor(stored, by_group, kind)), scales[:, :, None]
    zero_point = opset.constant(np.full((1,) * scales.ndim, 1 << (bits - 1), np.uint8))
    weights = opset.subtract(opset.convert(weights, "f16"), opset.convert(zero_point, "f16"))
    weights = opset.multiply(weights, opset.constant(scales))
    if scales.ndim == 3:
        weights = opset.reshape(weights, opset.constant(np.array([out_features, in_features])), False)
    return opset.matmul(x, opset.convert(weights, "f32"), False, True)
