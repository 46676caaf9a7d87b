"""Weight-only quantization of a float model, by NNCF, a few layers at a time.

NNCF chooses integers, scales and zero points; what is saved is compressed-tensors' `pack-quantized`, which
transformers, vLLM and others load.
"""

import io
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, Literal

import torch
from torch import nn

from ..errors import SCAPError, first_line
from ..progress import ProgressBar
from .owners import Owners
from .prunable import is_conv1d, is_fully_connected
from .quantized import QuantizedLinear
from .readers import adopt_layers
from .wrappers import saved_modules


WeightFormat = Literal["int8", "int4"]
# As of `optimum-cli export openvino`.
DEFAULT_GROUP_SIZE = 128
# NNCF takes half a second for a model, and holds what it quantizes.
LAYERS_AT_A_TIME = 16


class _Alone(nn.Module):
    """A model of some layers, each of which reads an input of its own."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """`[rows, in_features]` to `[rows, out_features]` of each layer."""
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


@torch.no_grad()
def quantize_weights(
    model: nn.Module, weight_format: WeightFormat, group_size: int | None = None, symmetric: bool = False
) -> None:
    """Quantizes the weights of the fully connected layers of `model`, in place, but for the head.

    Args:
        model: a float model.
        weight_format: `int8`, with one scale per output channel, or `int4`.
        group_size: input channels that share a scale of INT4; -1 for all; 128 by default.
        symmetric: whether there are no zero points.

    Raises:
        SCAPError: naming the layer whose input channels the group size does not divide, or a model with nothing to
            quantize; the model is untouched then.
    """
    if weight_format == "int8" and group_size is not None:
        raise SCAPError("--group-size is for int4: int8 has one scale per output channel")
    size = DEFAULT_GROUP_SIZE if group_size is None else group_size
    layers = _layers(model)
    if any(isinstance(module, QuantizedLinear) for module in layers.values()):
        raise SCAPError("the model is quantized already: --weight-format is for models with floating-point weights")
    if not layers:
        conv1d = any(is_conv1d(module) for module in model.modules())
        why = ": the layers of its kind, Conv1D, are not quantized" if conv1d else ""
        raise SCAPError(f"the model has no fully connected layer to quantize{why}")
    if weight_format == "int4":
        for path, module in layers.items():
            check_group_size(path, module.in_features, size)
    mode, fields = _mode(weight_format, size, symmetric)
    with _quiet_nncf(), ProgressBar("quantizing weights", len(layers)) as bar:
        paths = list(layers)
        for first in range(0, len(paths), LAYERS_AT_A_TIME):
            some = {path: layers[path] for path in paths[first : first + LAYERS_AT_A_TIME]}
            _quantize(some, mode, fields)
            for _ in some:
                bar.advance()


def _quantize(layers: dict[str, nn.Linear], mode: Any, fields: dict[str, Any]) -> None:
    import nncf

    alone = _Alone(layers.values())
    dtypes = [layer.weight.dtype for layer in layers.values()]
    inputs = tuple(layer.weight.new_zeros(1, layer.in_features) for layer in layers.values())
    try:
        with redirect_stdout(io.StringIO()):  # its bars
            nncf.compress_weights(alone, mode=mode, dataset=nncf.Dataset([inputs]), **fields)
    except (nncf.errors.ValidationError, nncf.errors.InternalError, ValueError, RuntimeError) as error:
        first, *_ = layers
        raise SCAPError(f"layer {first}, or one of the next, cannot be quantized: {first_line(error)}") from error
    adopt_layers(alone, dtypes[0])
    for (path, layer), dtype in zip(layers.items(), dtypes, strict=True):
        made: Any = layer
        made.scap_name, made.scap_dtype = path, dtype


@contextmanager
def _quiet_nncf() -> Iterator[None]:
    """It prints a table per model, which is per layer here."""
    nncf_logger = logging.getLogger("nncf")
    level = nncf_logger.level
    nncf_logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        nncf_logger.setLevel(level)


def check_group_size(path: str, in_features: int, group_size: int) -> None:
    """Raises a SCAPError that names the layer, and what divides its input channels, if `group_size` does not."""
    if group_size == -1 or group_size > 0 and in_features % group_size == 0:
        return
    fitting = [str(size) for size in (256, 128, 64, 32, 16) if in_features % size == 0]
    advice = f"; {', '.join(fitting)} {'do' if len(fitting) > 1 else 'does'}" if fitting else ""
    raise SCAPError(
        f"--group-size: {group_size} does not divide the {in_features} input channels of layer {path}{advice}, and -1 "
        "gives each output channel one scale"
    )


def _layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers to quantize by path."""
    owners = Owners(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    found = {}
    for path, module in saved_modules(model):
        if module is head or not is_fully_connected(module):
            continue
        if isinstance(module, nn.Linear) and owners[module.weight] > 1:
            continue
        if isinstance(module, nn.Linear | QuantizedLinear):
            found[path] = module
    return found  # type: ignore[return-value]


def _mode(weight_format: WeightFormat, group_size: int, symmetric: bool) -> tuple[Any, dict[str, Any]]:
    """NNCF's arguments."""
    from nncf import CompressWeightsMode

    if weight_format == "int8":
        return (CompressWeightsMode.INT8_SYM if symmetric else CompressWeightsMode.INT8_ASYM), {}
    mode = CompressWeightsMode.INT4_SYM if symmetric else CompressWeightsMode.INT4_ASYM
    return mode, {"group_size": group_size, "all_layers": True, "ratio": 1.0}
