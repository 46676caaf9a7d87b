"""Fully connected layers whose input activations are pruned.

    keep_i = |x_i - m| > t                      compared in float32, strictly greater; NaN is kept
    y      = sum over kept i of (x_i - m) W[:, i]  +  b + m * W·1
           = W · where(keep, x, m)  +  b

(SCAP, arXiv 2412.07174, section 3). The first form reads only the weights of kept channels and serves forwards of up
to `MAX_SPARSE_ROWS` tokens; the second is an ordinary matrix product behind an elementwise operation and serves the
rest.
"""

import logging
import types
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import ApplyTo
from ..core.parameters import LayerParameters
from ..errors import SCAPError
from .kernels import sparse_linear
from .prunable import is_fully_connected, why_dense


logger = logging.getLogger(__name__)

MAX_SPARSE_ROWS = 8


def keep_mask(x: Tensor, mode: float, threshold: float) -> Tensor:
    """Which elements of `x` are kept: a bool tensor of the same shape."""
    return ~((x.float() - mode).abs() <= threshold)


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


def prune(x: Tensor, mode: float, threshold: float) -> Tensor:
    """`x` with `mode` in place of every element that is pruned. Gradients pass through what is kept."""
    return torch.where(keep_mask(x, mode, threshold), x, torch.full((), mode, dtype=x.dtype, device=x.device))


class GivenOutput:
    """An output that was computed ahead, for one input."""

    def __init__(self) -> None:
        self._input_and_output: tuple[Tensor, Tensor] | None = None

    def put(self, x: Tensor, output: Tensor) -> None:
        """Leaves `output` for the call with `x`, the very tensor."""
        self._input_and_output = (x, output)

    def take(self, x: Tensor) -> Tensor | None:
        """The output for `x`, once; None if there is none."""
        found = self._input_and_output  # once: other threads may put theirs
        if found is None or found[0] is not x:
            return None
        self._input_and_output = None
        return found[1]

    def forget(self) -> bool:
        """Whether there was an output that nobody took."""
        if self._input_and_output is None:
            return False
        self._input_and_output = None
        return True


class _PrunedInput:
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
    # The dtype of the weights, and the threshold in it.
    _scap_dtype: torch.dtype
    scap_shrinkage: float
    scap_folded_bias: Tensor | None
    _scap_folded_versions: tuple[int, ...]
    # Whether the weights were brought into another order in memory than they had.
    _scap_reordered: bool = False
    # What the block around the layer computes ahead, see `shared_input`; None where there is no such block.
    scap_given: "GivenOutput | None" = None

    def output_major_weight(self) -> Tensor:
        """The weights as nn.Linear has them, `[out_features, in_features]`, not necessarily contiguous."""
        raise NotImplementedError

    def store_input_major(self, weight: Tensor) -> None:
        """Takes `weight` `[in_features, out_features]` over as the memory of the parameter."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Brings the weights into the order that the sparse operation reads and folds the mode into the bias.

        Called again whenever weights are loaded, moved or converted; without effect on weights that are not there (on
        the meta device until a checkpoint is loaded, or offloaded) or not whole (shards of FSDP and DeepSpeed).
        """
        self._scap_dtype = self.weight.dtype
        self.scap_shrinkage = round_down(self.scap_threshold, self.weight.dtype)
        if self.weight.is_meta or type(self.weight) is not nn.Parameter or self.weight.dim() != 2:
            self.scap_folded_bias = None
            return
        # What is made in inference mode could never be trained; a weight that was made there needs its like.
        with torch.inference_mode(self.weight.is_inference()), torch.no_grad():
            self._order_weights()
            weight = self.output_major_weight()
            if self.scap_mode == 0.0:
                self.scap_folded_bias = None
            else:
                folded = self.scap_mode * weight.sum(dim=1, dtype=torch.float32)
                self.scap_folded_bias = folded if self.bias is None else folded + self.bias.float()
                self._scap_folded_versions = self._versions()

    def _order_weights(self) -> None:
        weight = self.output_major_weight()
        if wants_input_major(weight):
            if not _is_input_major(weight):
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
        weight = self.output_major_weight()
        # Many tokens are sorted out first: prefill waits for Python. A recorded size is no int.
        size = x.numel()
        if type(size) is not int or size <= MAX_SPARSE_ROWS * x.shape[-1]:
            if is_recorded():
                if torch.jit.is_tracing():  # type: ignore[attr-defined]
                    return self._forward_in_exported_form(x, weight)
            elif self.runs_sparse(x):
                return sparse_linear(x, weight, self.kernel_bias(), threshold=self.scap_threshold, mode=self.scap_mode)
        if self.scap_apply_to == "decode" and self.runs_dense(x):
            return F.linear(x, weight, self.bias)
        return F.linear(self.pruned_input(x), weight, self.bias)

    def pruned_input(self, x: Tensor) -> Tensor:
        """`x` with the mode in place of what is pruned, for the ordinary matrix product."""
        if self.prunes_to_zero(x):
            # One operation instead of five; a NaN is kept, and the comparison is the float32 one but for its cost.
            return torch.hardshrink(x, self.scap_shrinkage)
        return prune(x, self.scap_mode, self.scap_threshold)

    def prunes_to_zero(self, x: Tensor) -> bool:
        """Whether what is pruned of `x` are the elements in [-scap_shrinkage, scap_shrinkage], and becomes zero."""
        return self.scap_mode == 0.0 and x.dtype == self._scap_dtype

    def runs_dense(self, x: Tensor) -> bool:
        """Whether a forward of `x` `[..., in_features]` prunes nothing."""
        return self.scap_apply_to == "decode" and not _is_one_token(x)

    def kernel_bias(self) -> Tensor | None:
        """The bias that the sparse operation adds, `[out_features]`: with the mode folded in where there is one."""
        return self.bias if self.scap_mode == 0.0 else self.scap_folded_bias

    def runs_sparse(self, x: Tensor) -> bool:
        """Whether a forward of `x` `[..., in_features]` runs the sparse operation."""
        # Before anything depends on the number of rows: an exported program is to serve any.
        if is_recorded():
            return False
        rows = x.numel() // x.shape[-1]
        if rows == 0 or rows > MAX_SPARSE_ROWS or self.runs_dense(x):
            return False
        if torch.is_autocast_enabled(x.device.type):  # which knows the dense product, not the sparse operation
            return False
        weight = self.output_major_weight()
        if x.dtype != weight.dtype or x.device != weight.device:
            return False
        if wants_input_major(weight) and not _is_input_major(weight):
            return False
        if self.scap_mode != 0.0:
            if self.scap_folded_bias is None:
                return False
            if not torch.compiler.is_compiling() and self._scap_folded_versions != self._versions():
                self.prepare()
        return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))

    def _forward_in_exported_form(self, x: Tensor, weight: Tensor) -> Tensor:
        """The operations that an exported OpenVINO IR holds: Abs -> LessEqual -> Select, the mode in the bias."""
        centred = x if self.scap_mode == 0.0 else x - self.scap_mode
        threshold: Any = self.scap_threshold
        if self.scap_apply_to == "decode" and x.dim() > 1:  # read from the shape of whatever the export is given
            one_token = torch._shape_as_tensor(x)[-2] == 1
            threshold = torch.where(one_token, threshold, 0.0)
        pruned = torch.where(centred.abs() <= threshold, torch.zeros((), dtype=x.dtype), centred)
        if self.scap_mode == 0.0:
            return F.linear(pruned, weight, self.bias)
        assert self.scap_folded_bias is not None
        return F.linear(pruned, weight) + self.scap_folded_bias.to(x.dtype)

    def _versions(self) -> tuple[int, ...]:
        """Changes whenever the weights or the bias are changed in place, as an optimizer does."""
        values = (self.weight,) if self.bias is None else (self.weight, self.bias)
        return tuple(map(_version, values))

    def train(self, mode: bool = True) -> Any:
        """As nn.Module's; also folds the mode anew, for weights that were changed through `.data` (a merged LoRA)."""
        result = super().train(mode)  # type: ignore[misc]
        if self.scap_mode != 0.0:
            self.prepare()
        return result

    def extra_repr(self) -> str:
        parameters = self.scap_parameters
        return (
            f"{super().extra_repr()}, role={parameters.role}, mode={parameters.mode:.4g}, "  # type: ignore[misc]
            f"threshold={parameters.threshold:.4g}, target_sparsity={parameters.target_sparsity:.3g}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        self.prepare()
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        name = f"{prefix}weight"
        if self._scap_reordered and not keep_vars and name in destination:  # safetensors takes no other order
            destination[name] = _contiguous(destination[name])

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        self.prepare()


class SCAPLinear(_PrunedInput, nn.Linear):
    """nn.Linear with pruned input activations; made by `convert`."""

    def output_major_weight(self) -> Tensor:
        return self.weight

    def store_input_major(self, weight: Tensor) -> None:
        self.weight.data = weight.t()


def _conv1d_class() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


_scap_conv1d: type[nn.Module] | None = None


def scap_conv1d_class() -> type[nn.Module]:
    """The pruned counterpart of transformers' Conv1D (GPT-2), whose weights are `[in_features, out_features]`."""
    global _scap_conv1d
    if _scap_conv1d is None:

        class SCAPConv1D(_PrunedInput, _conv1d_class()):  # type: ignore[misc]
            """Conv1D with pruned input activations; made by `convert`."""

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


def convert(module: nn.Module, parameters: LayerParameters, apply_to: ApplyTo) -> None:
    """Makes a fully connected layer prune its input activations, in place.

    The module stays the same object, with its parameters, hooks (accelerate's offloading among them) and place in the
    model; only its class changes.

    Raises:
        SCAPError: if `module` is no layer that can be pruned, or is pruned already.
    """
    if isinstance(module, _PrunedInput):
        raise SCAPError("the layer is pruned already")
    if not is_fully_connected(module):
        reason = why_dense(module) or "it is no fully connected layer"
        raise SCAPError(f"a {type(module).__name__} cannot be pruned: {reason}")
    cls: Any = SCAPLinear if isinstance(module, nn.Linear) else scap_conv1d_class()
    module.__class__ = cls
    module.scap_parameters = parameters  # type: ignore[assignment]
    module.scap_apply_to = apply_to  # type: ignore[assignment]
    module.scap_mode = parameters.mode  # type: ignore[assignment]
    module.scap_threshold = parameters.threshold  # type: ignore[assignment]
    module.register_buffer("scap_folded_bias", None, persistent=False)
    if hasattr(module, "_old_forward"):  # accelerate calls what it found when its hook was added
        module._old_forward = types.MethodType(cls.forward, module)  # type: ignore[assignment]
    elif "forward" in vars(module):  # the class's own, which accelerate leaves behind when its hook is removed
        del module.forward
    module.prepare()  # type: ignore[operator]


def is_pruned(module: nn.Module) -> bool:
    """Whether `convert` was called on `module`."""
    return isinstance(module, _PrunedInput)


def is_recorded() -> bool:
    """Whether operations are being recorded for a program to export, by torch.jit.trace or torch.export."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return True
    # Under torch.compile is_exporting() is true in some versions of torch.
    return not torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting()


def _version(value: Tensor) -> int:
    try:
        return value._version
    except RuntimeError:  # made in inference mode
        return 0


def wants_input_major(weight: Tensor) -> bool:
    """Whether the sparse operation reads these weights one input channel at a time: a kernel does, plain torch not."""
    return weight.is_cuda


def _contiguous(weight: Tensor) -> Tensor:
    try:
        return weight.contiguous()
    except torch.OutOfMemoryError:  # all copies together may not fit beside the model
        return weight.cpu().contiguous()


def _is_input_major(weight: Tensor) -> bool:
    """Whether the weights `[out, in]` of each input channel are contiguous."""
    out_features, channels = weight.shape
    return (out_features == 1 or weight.stride(0) == 1) and (channels == 1 or weight.stride(1) >= out_features)


def _is_one_token(x: Tensor) -> bool:
    """Whether `x` `[..., tokens, channels]` holds one token per sequence."""
    return x.dim() < 2 or x.shape[-2] == 1
