"""GGUF files, of llama.cpp: their layers become a checkpoint of safetensors files, integers and scales as they are.

    Q4_0   blocks of 32:  w = (q - 8) d                          symmetric INT4, float16 scales
    Q4_1   blocks of 32:  w = q d + m                            INT4 with offsets, float16 scales and offsets
    Q8_0   blocks of 32:  w = q d                                symmetric INT8, float16 scales
    Q4_K   groups of 32:  w = q (d sc) - dmin m                  INT4 with offsets; the products are float32, exact
    Q6_K   groups of 16:  w = (q - 32) (d sc)                    as symmetric INT8; the products are float32, exact

What else there is (embeddings, heads, norms, and weights of other types) is multiplied out. A file of Q4_0 and Q8_0
alone becomes a compressed-tensors checkpoint (`pack-quantized`). Offsets have no form there: such a checkpoint is of
the method `gguf`, which is ours, and has `weight_offset` `[out, groups]` beside the tensors of `pack-quantized`.

(llama.cpp ggml/src/ggml-common.h, gguf-py/gguf/quants.py; names and the order of rows are transformers' business)
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...errors import SCAPError, first_line, raise_interruption_behind
from ..weights import IntegerWeights
from .base import LayerShape
from .compressed_tensors import CompressedTensorsReader, packed_config, packed_storage


METHOD = "gguf"
EXACT_TYPES = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")
# Of the files that are written.
_SHARD_BYTES = 2 * 10**9


class GGUFReader(CompressedTensorsReader):
    """Checkpoints that `convert_gguf` wrote and compressed-tensors has no form for."""

    name = "GGUF"
    methods = (METHOD,)


def convert_gguf(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes the model in a GGUF file to `folder`, as a checkpoint that `readers` reads.

    Args:
        file: the GGUF file.
        folder: an empty folder. A tokenizer is not written.
        dtype: of what is not quantized.

    Raises:
        SCAPError: if the file is damaged, or of an architecture that transformers does not read.
    """
    try:
        import gguf
    except ImportError as error:
        raise SCAPError("GGUF files are read with the gguf package: pip install gguf") from error
    try:
        content = gguf.GGUFReader(file)
        model, architecture, fields = _empty_model(file)
    except Exception as error:  # the package checks little, and a damaged file fails anywhere
        raise_interruption_behind(error)
        raise SCAPError(f"{file} cannot be read: {first_line(error)}") from error
    writer = _Writer(folder)
    storages = {}
    linears = {f"{path}.weight": module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings()
    missing = {name for name, _ in model.named_parameters()}
    for name, tensor, process in _named_tensors(content, model, architecture, fields, file):
        module = linears.get(name)
        kind = tensor.tensor_type.name
        missing.discard(name)
        try:
            rows = _row_order(process, module) if module is not None and module is not head else None
            if module is None or rows is None or kind not in EXACT_TYPES:
                plain = process(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
                writer.add(name, torch.from_numpy(np.ascontiguousarray(plain)).to(dtype))
                continue
            path = name.removesuffix(".weight")
            layer = LayerShape(path, module.in_features, module.out_features)
            weights = integers_of(tensor.data, kind, layer)
        except (ValueError, IndexError) as error:
            raise SCAPError(f"{file}: {tensor.name}: {first_line(error)}") from error
        offsets = None if weights.zero_points is None else weights.zero_points[rows]
        weights = IntegerWeights(weights.bits, weights.integers[rows], weights.scales[rows], offsets)
        storages[path] = packed_storage(layer, weights)
        for part, value in storages[path].write(weights).items():
            writer.add(f"{path}.{part}", value)
    if model.config.tie_word_embeddings:
        missing = {name for name in missing if not name.startswith("lm_head.")}
    if missing:
        raise SCAPError(
            f"{file} lacks {len(missing)} weights of a {type(model).__name__}, such as {sorted(missing)[0]}"
        )
    writer.close()
    if storages:
        others = [path.removesuffix(".weight") for path in linears if path.removesuffix(".weight") not in storages]
        config = packed_config(storages, others)
        if any("weight_offset" in storage.tensors for storage in storages.values()):
            config["quant_method"] = METHOD
        model.config.quantization_config = config
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(folder)


def integers_of(data: NDArray[np.uint8], kind: str, layer: LayerShape) -> IntegerWeights:
    """The weights of a layer in blocks of one of EXACT_TYPES, `[out_features, bytes]`.

    Raises:
        ValueError: if the bytes are not those of such a layer.
    """
    import gguf

    channels, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    wanted = (layer.out_features, layer.in_features // channels * size)
    if layer.in_features % channels != 0 or data.shape != wanted:
        raise ValueError(f"{kind} data of shape {list(data.shape)} are not {layer.out_features} x {layer.in_features}")
    blocks = np.ascontiguousarray(data).reshape(-1, size)
    bits, signed = (8, True) if kind in ("Q8_0", "Q6_K") else (4, kind == "Q4_0")
    integers, scales, offsets = _DECODERS[kind](blocks)
    shape = (layer.out_features, -1)
    return IntegerWeights(
        bits,
        torch.from_numpy(integers.astype(np.int8 if signed else np.uint8).reshape(layer[2], layer[1])),
        torch.from_numpy(scales.reshape(shape)),
        None if offsets is None else torch.from_numpy(offsets.reshape(shape)),
    )


_Decoded = tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]


def _halves(blocks: NDArray[np.uint8], place: int) -> NDArray[np.float16]:
    return np.ascontiguousarray(blocks[:, 2 * place : 2 * place + 2]).view(np.float16)


def _nibbles(packed: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Of each `width` bytes first the lower halves, then the upper ones."""
    parts = packed.reshape(packed.shape[0], -1, 1, width)
    return np.concatenate([parts & 15, parts >> 4], axis=2).reshape(packed.shape[0], -1)


def _q4_0(blocks: NDArray[np.uint8]) -> _Decoded:
    return _nibbles(blocks[:, 2:], 16).astype(np.int8) - 8, _halves(blocks, 0), None


def _q4_1(blocks: NDArray[np.uint8]) -> _Decoded:
    return _nibbles(blocks[:, 4:], 16), _halves(blocks, 0), _halves(blocks, 1)


def _q8_0(blocks: NDArray[np.uint8]) -> _Decoded:
    return blocks[:, 2:].view(np.int8), _halves(blocks, 0), None


def _q4_k(blocks: NDArray[np.uint8]) -> _Decoded:
    from gguf.quants import Q4_K

    factors, shifts = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    scales = _halves(blocks, 0).astype(np.float32) * factors.astype(np.float32)
    offsets = -(_halves(blocks, 1).astype(np.float32) * shifts.astype(np.float32))
    return _nibbles(blocks[:, 16:], 32), scales, offsets


def _q6_k(blocks: NDArray[np.uint8]) -> _Decoded:
    low = _nibbles(blocks[:, :128], 64).reshape(-1, 256)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    integers = (low | (high.reshape(-1, 256) & 3) << 4).astype(np.int8) - 32
    factors = blocks[:, 192:208].view(np.int8).astype(np.float32)
    scales = np.ascontiguousarray(blocks[:, 208:210]).view(np.float16).astype(np.float32) * factors
    return integers, scales, None


_DECODERS = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q6_K": _q6_k}


def _empty_model(file: Path) -> tuple[Any, str, Mapping[str, Any]]:
    """The model on the meta device, llama.cpp's name of its architecture, and what transformers read of the file."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    fields = load_gguf_checkpoint(str(file), return_tensors=False)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), fields["config"]["model_type"], fields


def _named_tensors(
    content: Any, model: nn.Module, architecture: str, fields: Mapping[str, Any], file: Path
) -> Iterator[tuple[str, Any, Any]]:
    """(transformers' name, the tensor, what brings its values into transformers' order)."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=fields["config"])
    names = get_gguf_hf_weights_map(model, processor)
    for tensor in content.tensors:
        if tensor.name not in names:
            continue

        def process(values: NDArray[Any], name: str = tensor.name) -> NDArray[Any]:
            done = processor.process(
                weights=values, name=name, tensor_key_mapping=names, parsed_parameters={"tensors": {}}
            )
            if done.name != name:
                raise SCAPError(f"{file}: {name}: such tensors, of experts for one, are not read")
            return done.weights

        yield names[tensor.name], tensor, process


def _row_order(process: Any, module: nn.Linear) -> Tensor | None:
    """Which row of the file each output channel is; None if `process` does more than to put rows in order."""
    rows = np.repeat(np.arange(module.out_features, dtype=np.float32)[:, None], 4, axis=1)
    ordered = np.asarray(process(rows.copy()))
    if ordered.shape != rows.shape or not (ordered == ordered[:, :1]).all():
        return None
    order = ordered[:, 0].astype(np.int64)
    return torch.from_numpy(order) if np.array_equal(np.sort(order), np.arange(module.out_features)) else None


class _Writer:
    """Writes tensors to safetensors files of a folder, with an index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, Tensor] = {}
        self._bytes = 0
        self._places: dict[str, str] = {}
        self._files = 0

    def add(self, name: str, tensor: Tensor) -> None:
        self._tensors[name] = tensor
        self._bytes += tensor.nbytes
        if self._bytes > _SHARD_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        index = {"metadata": {}, "weight_map": self._places}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    def _flush(self) -> None:
        from safetensors.torch import save_file

        self._files += 1
        file = f"model-{self._files:05}.safetensors"
        save_file(self._tensors, self._folder / file, metadata={"format": "pt"})
        self._places.update(dict.fromkeys(self._tensors, file))
        self._tensors, self._bytes = {}, 0
