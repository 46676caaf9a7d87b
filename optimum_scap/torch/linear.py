"""Fully connected layers whose input activations are pruned.

    keep_i = s_i * |x_i - m| > t                see `core.criterion`
    y      = sum over kept i of (x_i - m) W[:, i]  +  b + c + m * W·1
           = W · where(keep, x, m)  +  b + c

(c is the bias correction, where there is one.) The first form reads only the weights of kept channels and serves
forwards of few rows; the second is an ordinary matrix product behind an elementwise operation and serves the rest.
Which of them a forward takes is decided in `dispatch`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import MOST_DECODED_SEQUENCES, ApplyTo
from ..core.parameters import LayerParameters
from ..errors import SCAPError
from .criterion import prune
from .dispatch import Way, decodes, may_call_kernel, way_of
from .given import GivenOutput
from .kernels import sparse_linear
from .quantized import QuantizedLinear
from .weights import Weights, find_format


# Vectors that stay float32 whatever type the model is converted to, by what SCAPParameters call them.
VECTORS = {"scale": "scap_scale", "bias_correction": "scap_bias_correction"}


def round_down(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` not above `threshold`: for values of `dtype` comparing with it is the same."""
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            rounded = np.float16(threshold)
        # numpy would compare in float16
        return float(rounded if float(rounded) <= threshold else np.nextafter(rounded, np.float16(-np.inf)))
    if dtype == torch.bfloat16:  # the upper half of a float32
        bits = np.array(threshold, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        return float(bits.view(np.float32))
    return threshold


class Pruned:
    """Marks what prunes its input."""


class _PrunedInput(Pruned):
    """What SCAPLinear and SCAPConv1D share. The class of an existing layer becomes theirs, see `convert`.

    The weights keep their name, shape and order of dimensions. Where a kernel reads them they lie input-channel-major
    in memory, so that the weights of one input channel are contiguous; elsewhere they lie as they did.
    """

    # nn.Module's part, for type checkers
    weight: Any
    bias: Any

    scap_parameters: LayerParameters
    scap_apply_to: ApplyTo
    # Plain numbers, which torch.compile reads where it does not read the attributes of `scap_parameters`.
    scap_mode: float
    scap_threshold: float
    # Buffers `[in_features]` and `[out_features]`, float32, or None. They belong to the checkpoint.
    scap_scale: Tensor | None
    scap_bias_correction: Tensor | None
    # The dtype of the weights, and the threshold in it.
    _scap_dtype: torch.dtype
    scap_shrinkage: float
    # b + c + m * W·1 in float32, where there is more than b.
    scap_folded_bias: Tensor | None
    _scap_folds: bool
    _scap_folded_versions: tuple[int, ...]
    # Whether the weights were brought into another order in memory than they had.
    _scap_reordered: bool = False
    # Whether another module has the very same weights, as an embedding has those of a tied head.
    _scap_is_tied: bool = False
    # What the block around the layer computes ahead, see `blocks.shared_input`; None where there is no such block.
    scap_given: GivenOutput | None = None

    def output_major_weight(self) -> Tensor:
        """The weights as nn.Linear has them, `[out_features, in_features]`, not necessarily contiguous."""
        raise NotImplementedError

    def store_input_major(self, weight: Tensor) -> None:
        """Takes `weight` `[in_features, out_features]` over as the memory of the parameter."""
        raise NotImplementedError

    def kernel_weights(self) -> Tensor | Weights:
        """What the sparse operation is given."""
        return self.output_major_weight()

    def weights_device(self) -> torch.device:
        """Where the weights are."""
        return self.weight.device

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias for any rows `[..., in_features]`."""
        return F.linear(x, self.output_major_weight(), bias)

    def activation_dtype(self) -> torch.dtype:
        """The type of the activations that the layer is meant for."""
        return self.weight.dtype

    def prepare(self) -> None:
        """Brings the weights into the order that the sparse operation reads and folds the mode into the bias.

        Called again whenever weights are loaded, moved or converted; without effect on weights that are not there (on
        the meta device until a checkpoint is loaded, or offloaded) or not whole (shards of FSDP and DeepSpeed).
        """
        self._scap_dtype = self.activation_dtype()
        self.scap_shrinkage = round_down(self.scap_threshold, self._scap_dtype)
        if not self._has_whole_weights():
            self.scap_folded_bias = None
            return
        # What is made in inference mode could never be trained; a weight that was made there needs its like.
        with torch.inference_mode(self._weights_are_inference()), torch.no_grad():
            self._order_weights()
            if not self._scap_folds:
                self.scap_folded_bias = None
                return
            folded = self.scap_mode * self._row_sums()
            for value in (self.bias, self.scap_bias_correction):
                if value is not None:
                    folded = folded + value.float()
            self.scap_folded_bias = folded
            self._scap_folded_versions = self._versions()

    def _has_whole_weights(self) -> bool:
        return not self.weight.is_meta and type(self.weight) is nn.Parameter and self.weight.dim() == 2

    def _weights_are_inference(self) -> bool:
        return self.weight.is_inference()

    def _row_sums(self) -> Tensor:
        """W·1 in float32."""
        return self.output_major_weight().sum(dim=1, dtype=torch.float32)

    def _order_weights(self) -> None:
        weight = self.output_major_weight()
        if wants_input_major(weight):
            if not _is_input_major(weight):
                if self._scap_is_tied:  # the embedding reads them the other way
                    self.weight = nn.Parameter(self.weight.detach(), self.weight.requires_grad)
                    self._scap_is_tied = False
                self.store_input_major(weight.t().contiguous())
                self._scap_reordered = True
        elif self._scap_reordered:  # back from a GPU
            self.weight.data = self.weight.data.contiguous()
            self._scap_reordered = False

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        x = input  # nn.Linear's name for it, which callers may use
        given = self.scap_given
        if given is not None and (output := given.take(x)) is not None:
            return output
        way = way_of(x, self)
        if way is Way.SPARSE:
            return sparse_linear(
                x,
                self.kernel_weights(),
                self.kernel_bias(),
                threshold=self.scap_threshold,
                mode=self.scap_mode,
                scale=self.scap_scale,
            )
        if way is Way.PRUNED:
            return self.multiply(self.pruned_input(x), self.pruned_bias())
        if way is Way.DENSE:
            return self.multiply(x, self.bias)
        return self._forward_in_exported_form(x)

    def pruned_input(self, x: Tensor) -> Tensor:
        """`x` with the mode in place of what is pruned, for the ordinary matrix product."""
        if self.prunes_to_zero(x):
            # One operation instead of five; a NaN is kept, and the comparison is the float32 one but for its cost.
            return torch.hardshrink(x, self.scap_shrinkage)
        return prune(x, self.scap_mode, self.scap_threshold, self.scap_scale)

    def pruned_bias(self) -> Tensor | None:
        """What is added to the product with the pruned input, `[out_features]`: the bias, with its correction."""
        correction = self.scap_bias_correction
        if correction is None:
            return self.bias
        correction = correction.to(self._scap_dtype)
        return correction if self.bias is None else self.bias + correction

    def prunes_to_zero(self, x: Tensor) -> bool:
        """Whether what is pruned of `x` are the elements in [-scap_shrinkage, scap_shrinkage], and becomes zero."""
        return self.scap_mode == 0.0 and self.scap_scale is None and x.dtype == self._scap_dtype

    def runs_dense(self, x: Tensor) -> bool:
        """Whether a forward of `x` `[..., in_features]` prunes nothing."""
        return self.scap_apply_to == "decode" and not decodes(x)

    def kernel_bias(self) -> Tensor | None:
        """The bias that the sparse operation adds, `[out_features]`: with mode and correction folded in."""
        return self.scap_folded_bias if self._scap_folds else self.bias

    def can_run_sparse(self, x: Tensor) -> bool:
        """Whether the sparse operation can run on the few rows of `x` `[..., in_features]`. Asked by `dispatch`."""
        if x.numel() == 0 or self.runs_dense(x) or not self._kernel_can_run(x):
            return False
        if self._scap_folds:
            if self.scap_folded_bias is None:
                return False
            if not torch.compiler.is_compiling() and self._scap_folded_versions != self._versions():
                self.prepare()
        return True

    def _kernel_can_run(self, x: Tensor) -> bool:
        weight = self.output_major_weight()
        return may_call_kernel(x, weight) and (not wants_input_major(weight) or _is_input_major(weight))

    def _forward_in_exported_form(self, x: Tensor) -> Tensor:
        """The operations that an exported OpenVINO IR holds: Abs -> LessEqual -> Select, the mode in the bias."""
        centered = x if self.scap_mode == 0.0 else x - self.scap_mode
        score = centered.abs() if self.scap_scale is None else centered.abs() * self.scap_scale
        threshold: Any = self.scap_threshold
        if self.scap_apply_to == "decode" and x.dim() > 1:  # read from the shape of whatever the export is given
            if self.scap_bias_correction is not None:
                raise SCAPError(
                    "a bias correction cannot be exported with apply_to decode: it belongs to pruned tokens"
                )
            shape = torch._shape_as_tensor(x)
            decodes_x = shape[-2] == 1
            if x.dim() > 2:
                sequences = shape[0] if x.dim() == 3 else shape[:-2].prod()
                decodes_x = torch.logical_and(decodes_x, sequences <= MOST_DECODED_SEQUENCES)
            threshold = torch.where(decodes_x, threshold, 0.0 if self.scap_scale is None else -1.0)
        pruned = torch.where(score <= threshold, torch.zeros((), dtype=x.dtype), centered)
        if not self._scap_folds:
            return self.multiply(pruned, self.bias)
        assert self.scap_folded_bias is not None
        return self.multiply(pruned, None) + self.scap_folded_bias.to(x.dtype)

    def _weight_tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def _versions(self) -> tuple[int, ...]:
        """Changes whenever the weights or the bias are changed in place, as an optimizer does."""
        values = (*self._weight_tensors(), self.bias, self.scap_bias_correction)
        return tuple(version(value) for value in values if value is not None)

    def train(self, mode: bool = True) -> Any:
        """As nn.Module's; also folds the mode anew, for weights that were changed through `.data` (a merged LoRA)."""
        result = super().train(mode)  # type: ignore[misc]
        if self._scap_folds:
            self.prepare()
        return result

    def extra_repr(self) -> str:
        parameters = self.scap_parameters
        role = "" if parameters.role is None else f"role={parameters.role}, "
        return (
            f"{super().extra_repr()}, {role}mode={parameters.mode:.4g}, "  # type: ignore[misc]
            f"threshold={parameters.threshold:.4g}, target_sparsity={parameters.target_sparsity:.3g}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        buffers: Any = self._buffers  # type: ignore[attr-defined]
        vectors = {name: buffers.pop(name) for name in VECTORS.values() if name in buffers}
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        for name, vector in vectors.items():
            moved = fn(vector)
            # Only the device counts for them.
            buffers[name] = moved if moved.dtype == torch.float32 else vector.to(moved.device)
        self.prepare()
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        name = f"{prefix}weight"
        if self._scap_reordered and not keep_vars and name in destination:  # safetensors takes no other order
            destination[name] = contiguous(destination[name])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        self.prepare()


class SCAPLinear(_PrunedInput, nn.Linear):
    """nn.Linear with pruned input activations; made by `convert.convert`."""

    def output_major_weight(self) -> Tensor:
        return self.weight

    def store_input_major(self, weight: Tensor) -> None:
        self.weight.data = weight.t()


class SCAPQuantizedLinear(_PrunedInput, QuantizedLinear):
    """QuantizedLinear with pruned input activations; made by `convert.convert`."""

    def weights_device(self) -> torch.device:
        return self.device

    def kernel_weights(self) -> Weights:
        return self.packed_weights()

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return QuantizedLinear.multiply(self, x, bias)

    def activation_dtype(self) -> torch.dtype:
        return self.scap_dtype

    def pack(self) -> None:
        super().pack()
        self.prepare()

    def _has_whole_weights(self) -> bool:
        return self.is_packed and self.device.type != "meta"

    def _weights_are_inference(self) -> bool:
        return self.packed_weights().tensors[0].is_inference()

    def _row_sums(self) -> Tensor:
        format, tensors = self.packed_weights()
        return find_format(format).row_sums(tensors)

    def _order_weights(self) -> None:
        pass  # the format has an order of its own

    def _kernel_can_run(self, x: Tensor) -> bool:
        return may_call_kernel(x, self)

    def _weight_tensors(self) -> tuple[Tensor, ...]:
        return self.packed_weights().tensors


def _conv1d_class() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


_scap_conv1d: type[nn.Module] | None = None


def scap_conv1d_class() -> type[nn.Module]:
    """The pruned counterpart of transformers' Conv1D (GPT-2), whose weights are `[in_features, out_features]`."""
    global _scap_conv1d
    if _scap_conv1d is None:

        class SCAPConv1D(_PrunedInput, _conv1d_class()):  # type: ignore[misc]
            """Conv1D with pruned input activations; made by `convert.convert`."""

            # where pickle looks for it, see __getattr__
            __qualname__ = "SCAPConv1D"

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x)

            def output_major_weight(self) -> Tensor:
                return self.weight.t()

            def store_input_major(self, weight: Tensor) -> None:
                self.weight.data = weight

        _scap_conv1d = SCAPConv1D
    return _scap_conv1d


def __getattr__(name: str) -> Any:
    if name == "SCAPConv1D":
        return scap_conv1d_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Layers whose weights blocks hand to one kernel; a Conv1D's lie the other way.
TOGETHER = (SCAPLinear, SCAPQuantizedLinear)


def run_together(layers: Sequence[nn.Module]) -> bool:
    """Whether one kernel can run `layers`: weights of one format, with groups of one size, in tensors of one type."""
    first: Any = layers[0]
    if any(type(layer) is not type(first) for layer in layers):
        return False
    if not isinstance(first, QuantizedLinear):
        return True
    return len({layer.kind_of_weights() for layer in layers}) == 1  # type: ignore[operator]


def is_pruned(module: nn.Module) -> bool:
    """Whether `convert.convert` was called on `module`."""
    return isinstance(module, Pruned)


def version(value: Tensor) -> int:
    """Changes whenever `value` is changed in place."""
    try:
        return value._version
    except RuntimeError:  # made in inference mode
        return 0


def wants_input_major(weight: Tensor) -> bool:
    """Whether the sparse operation reads these weights one input channel at a time: a kernel does, plain torch not."""
    return weight.is_cuda


def contiguous(weight: Tensor) -> Tensor:
    """A copy in the order of its dimensions, on the CPU where there is no room."""
    try:
        return weight.contiguous()
    except torch.OutOfMemoryError:  # all copies together may not fit beside the model
        return weight.cpu().contiguous()


def _is_input_major(weight: Tensor) -> bool:
    """Whether the weights `[out, in]` of each input channel are contiguous."""
    out_features, channels = weight.shape
    return (out_features == 1 or weight.stride(0) == 1) and (channels == 1 or weight.stride(1) >= out_features)
