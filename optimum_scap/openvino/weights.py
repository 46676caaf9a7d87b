"""The weights of a fully connected layer as the IR stores them: float, or integers with scales and zero points."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov

from .extension.packing import BufferPool, PackedLayer, pack_float, pack_integer, unpack_nibbles
from .graph import FullyConnected
from .mapped_files import MappedFiles


_INTEGERS = {"u8": (8, False), "i8": (8, True), "u4": (4, False), "i4": (4, True)}
_FLOATS = ("f32", "f16", "bf16")


class UnsupportedWeightsError(ValueError):
    """The weights are stored in a way that the sparse operation cannot read; the message says which."""


@dataclass(frozen=True)
class _Integers:
    """q `[out, in]`, scale and zero point `[out, groups]`: W = (q - zero_point) * scale.

    With `nibbles`, q is `[out, in / 2]` bytes of two values each. `stored` is the IR's own constant behind q.
    """

    q: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    bits: int
    signed: bool
    group_size: int
    nibbles: bool
    stored: np.ndarray


def pack_weights(
    layer: FullyConnected,
    bias: np.ndarray | None = None,
    *,
    library: Path | None = None,
    pool: BufferPool | None = None,
    files: MappedFiles | None = None,
) -> PackedLayer:
    """The weights of `layer` in the layout of the C++ operation, without requantizing them.

    Args:
        layer: a fully connected layer.
        bias: float32 `[out_features]` to add to its output, or None.
        library: the compiled extension; by default it is built or found in the cache.
        pool: where the packed weights' memory comes from.
        files: what the memory of the weights that were packed is given back to.

    Raises:
        UnsupportedWeightsError: if the weights are of another kind than f32, f16, bf16, INT8 or INT4 with scales per
            output channel or group of input channels.
    """
    node = _decompression(layer)
    if node.get_type_name() == "Constant":
        packed = _pack_float(layer, node, bias, library, pool)
        stored = node.data
    else:
        integers = _read_integers(layer, node)
        stored = integers.stored
        packed = _pack_integers(integers, bias, library, pool)
    if files is not None:
        files.release(stored)
    return packed


def _pack_integers(
    integers: _Integers, bias: np.ndarray | None, library: Path | None, pool: BufferPool | None
) -> PackedLayer:
    return pack_integer(
        integers.q,
        integers.scale,
        integers.zero_point,
        bias,
        bits=integers.bits,
        signed=integers.signed,
        group_size=integers.group_size,
        nibbles=integers.nibbles,
        library=library,
        pool=pool,
    )


def is_integer(layer: FullyConnected, bits: Collection[int] = (4, 8)) -> bool:
    """Whether the weights of `layer` are integers of so many bits with scales, as `pack_weights` reads them."""
    try:
        return _read_integers(layer, _decompression(layer)).bits in bits
    except UnsupportedWeightsError:
        return False


def _decompression(layer: FullyConnected) -> ov.Node:
    """The last operation of the weights' decompression, or their constant."""
    node = _skip(layer.weights, "Convert")
    return _skip(node.input_value(0), "Convert") if node.get_type_name() == "Reshape" else node


def _pack_float(
    layer: FullyConnected, constant: ov.Node, bias: np.ndarray | None, library: Path | None, pool: BufferPool | None
) -> PackedLayer:
    kind = constant.get_output_element_type(0).get_type_name()
    if kind not in _FLOATS:
        raise UnsupportedWeightsError(f"weights of type {kind} without scales")
    values = constant.data
    if kind == "bf16":
        values = values.view(np.uint16)
    values = values.T if layer.weights_transposed else values
    return pack_float(values, bias, bfloat16=kind == "bf16", library=library, pool=pool)


def _read_integers(layer: FullyConnected, node: ov.Node) -> _Integers:
    if node.get_type_name() != "Multiply":
        raise UnsupportedWeightsError(f"weights behind {node.get_type_name()}")
    centered, scale_node = (_skip(value, "Convert") for value in node.input_values())
    if scale_node.get_type_name() != "Constant":
        centered, scale_node = scale_node, centered
    if scale_node.get_type_name() != "Constant":
        raise UnsupportedWeightsError("scales that are no constant")
    zero_node = None
    if centered.get_type_name() == "Subtract":
        centered, zero_node = (_skip(value, "Convert") for value in centered.input_values())
    if centered.get_type_name() != "Constant":
        raise UnsupportedWeightsError(f"quantized weights behind {centered.get_type_name()}")

    kind = centered.get_output_element_type(0).get_type_name()
    if kind not in _INTEGERS:
        raise UnsupportedWeightsError(f"quantized weights of type {kind}")
    bits, signed = _INTEGERS[kind]
    shape = tuple(centered.get_output_shape(0))
    groups, group_size = _groups(layer, shape)
    nibbles = bits == 4 and layer.in_features % 2 == 0 and not layer.weights_transposed
    if nibbles:
        q = centered.data.reshape(-1).view(np.uint8).reshape(layer.out_features, layer.in_features // 2)
    else:
        q = _output_major(layer, _integers(centered), groups * group_size)
    scale = _parameters(layer, scale_node, shape, groups)
    if scale.dtype not in (np.float16, np.float32):
        raise UnsupportedWeightsError(f"scales of type {scale.dtype}")
    zero_point = None
    if zero_node is not None:
        if zero_node.get_type_name() != "Constant":
            raise UnsupportedWeightsError("zero points that are no constant")
        zero_point = _parameters(layer, zero_node, shape, groups)
        if zero_point.dtype.kind == "f":
            rounded = np.rint(zero_point)
            if (rounded != zero_point).any() or abs(rounded).max() > 255:
                raise UnsupportedWeightsError("zero points that are no integers")
            zero_point = rounded.astype(np.int16)
    return _Integers(q, scale, zero_point, bits, signed, group_size if groups > 1 else 0, nibbles, centered.data)


def _groups(layer: FullyConnected, shape: tuple[int, ...]) -> tuple[int, int]:
    """(number of groups, group size) along the input of quantized weights stored in `shape`.

    `[out, in]` or `[out, groups, group_size]`; transposed `[in, out]` or `[groups, group_size, out]`.
    """
    along_input = shape[:-1] if layer.weights_transposed else shape[1:]
    out_features = shape[-1] if layer.weights_transposed else shape[0]
    if len(shape) not in (2, 3) or out_features != layer.out_features or np.prod(along_input) != layer.in_features:
        raise UnsupportedWeightsError(f"quantized weights of shape {list(shape)}")
    return (along_input[0], along_input[1]) if len(along_input) == 2 else (1, along_input[0])


def _parameters(layer: FullyConnected, constant: ov.Node, weights: tuple[int, ...], groups: int) -> np.ndarray:
    """Scales or zero points as `[out, groups]`."""
    kind = constant.get_output_element_type(0).get_type_name()
    if kind not in (*_INTEGERS, "f16", "f32"):
        raise UnsupportedWeightsError(f"scales or zero points of type {kind}")
    shape = list(weights)
    shape[-2 if layer.weights_transposed else -1] = 1
    values = _integers(constant) if kind in _INTEGERS else constant.data
    try:
        values = np.broadcast_to(values, shape)
    except ValueError:
        raise UnsupportedWeightsError(f"scales or zero points of shape {list(values.shape)}") from None
    return _output_major(layer, values, groups)


def _output_major(layer: FullyConnected, values: np.ndarray, columns: int) -> np.ndarray:
    """Values stored with the output channel first, or last where the weights are transposed, as `[out, columns]`."""
    if layer.weights_transposed:
        return values.reshape(columns, layer.out_features).T
    return values.reshape(layer.out_features, columns)


def _integers(constant: ov.Node) -> np.ndarray:
    """The values of an integer constant in its own shape, one per element."""
    bits, signed = _INTEGERS[constant.get_output_element_type(0).get_type_name()]
    shape = constant.get_output_shape(0)
    if bits == 8:
        return constant.data.reshape(shape)
    values = unpack_nibbles(constant.data, int(np.prod(shape)))
    if signed:
        values = ((values ^ 8).astype(np.int8)) - np.int8(8)
    return values.reshape(shape)


def _skip(value: ov.Output, kind: str) -> ov.Node:
    node = value.get_node()
    while node.get_type_name() == kind:
        node = node.input_value(0).get_node()
    return node
