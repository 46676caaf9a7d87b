"""What gpu_decode.py compares SCAP with, on the Triton kernels in a checkout of github.com/ScalingIntelligence/CATS.

CATS (arXiv 2404.08763) prunes the neurons of a gated FFN whose activated gate is small. `gate` is read whole, `up` and
`down` for the kept neurons only:

    a = act(gate(x))        keep_i = |a_i| > t        y = sum over kept i of a_i up_i(x) W_down[:, i]

The reference's linear layer prunes its own input as SCAP does, and multiplies one token by CATS's kernel for `down`.
"""

import importlib.util
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimum_scap.core.parameters import LayerParameters
from optimum_scap.core.roles import OTHER
from optimum_scap.evaluation.sparsity import LayerSparsity, RealizedSparsity


# The largest blocks that the kernels are tuned over. They read columns past a weight's last, and the kernel for `down`
# inputs past the last row, where a block ends there.
UP_COLUMNS, DOWN_ROWS, DOWN_COLUMNS = 1024, 128, 2048


@dataclass(frozen=True)
class CatsKernels:
    """One token `[1, 1, in]` through layers of which only some channels are read.

    Args:
        up: `(x, activated [1, 1, out], weight [out, in], kept [1, 1, out])` to `activated * (weight x)`, of kept rows.
        down: `(x, weight [in, out], kept [1, 1, in])` to `weight.T x`, over kept rows.
        linear: `down` without the torch operation around it that torch.compile needs.
    """

    up: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    down: Callable[[Tensor, Tensor, Tensor], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor], Tensor]


def load_file(file: Path) -> types.ModuleType:
    """One file as a module, without the package around it (that of CATS wants its CUDA kernels compiled)."""
    spec = importlib.util.spec_from_file_location(f"baseline_{file.stem}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise SystemExit(f"{file} does not exist: is this the right checkout?")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_cats(checkout: Path) -> CatsKernels:
    """The kernels in `checkout`, as torch operations that torch.compile passes by and CUDA graphs capture."""
    module = load_file(checkout / "flash_gemv" / "flash_gemv" / "kernels.py")
    if not torch.cuda.is_available():
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise SystemExit(
                "without a GPU the kernels of CATS run in Triton's interpreter only: set TRITON_INTERPRET=1"
            )
        for value in vars(module).values():
            if hasattr(value, "configs"):  # the interpreter cannot tune; the largest blocks take the fewest steps
                value.configs = value.configs[-1:]

    @torch.library.custom_op("gpu_baselines::cats_up", mutates_args=())
    def up(x: Tensor, activated: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
        return module.gather_gemv_elemul_flag_3d(x, activated, weight, kept)

    @torch.library.custom_op("gpu_baselines::cats_down", mutates_args=())
    def down(x: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
        return module.gather_transposed_gemv_flag_3d(x, weight, kept)

    up.register_fake(lambda x, activated, weight, kept: torch.empty_like(activated))
    down.register_fake(lambda x, weight, kept: x.new_empty((*x.shape[:-1], weight.shape[1])))
    return CatsKernels(up, down, module.gather_transposed_gemv_flag_3d)


class CatsFeedForward(nn.Module):
    """A gated FFN that runs as CATS does: one token through its kernels, several through dense layers.

    Args:
        dense: the block whose place it takes, with `gate_proj`, `up_proj`, `down_proj`, without biases, and `act_fn`.
    """

    role = "neurons"

    def __init__(self, dense: Any, kernels: CatsKernels) -> None:
        super().__init__()
        hidden, neurons = dense.up_proj.in_features, dense.up_proj.out_features
        if hidden % UP_COLUMNS or neurons % DOWN_ROWS:
            raise SystemExit(
                f"the kernels of CATS need multiples of {UP_COLUMNS} and {DOWN_ROWS}: {hidden}, {neurons}"
            )
        self.gate_proj, self.up_proj, self.act_fn = dense.gate_proj, dense.up_proj, dense.act_fn
        self.down_weight = _input_major(dense.down_proj.weight)
        self.kernels = kernels
        self.threshold = 0.0

    def skippable_weights(self) -> int:
        """The number of weights that can be skipped: those of `up` and `down`, as `gate` is read whole."""
        return self.up_proj.weight.numel() + self.down_weight.numel()

    def compared(self, x: Tensor) -> Tensor:
        """What the threshold is compared with."""
        return self.act_fn(self.gate_proj(x))

    def forward(self, x: Tensor) -> Tensor:
        activated = self.compared(x)
        if _is_one_token(x):
            kept = activated.abs() > self.threshold
            hidden = self.kernels.up(x, activated, self.up_proj.weight, kept)
            return self.kernels.down(hidden, self.down_weight, kept)
        return F.linear(F.hardshrink(activated, self.threshold) * self.up_proj(x), self.down_weight.t())


class ReferenceLinear(nn.Module):
    """A linear layer that prunes its input: one token through the kernel, several through a dense product."""

    def __init__(self, dense: Any, parameters: LayerParameters, kernel: Callable[..., Tensor]) -> None:
        super().__init__()
        if parameters.mode != 0.0 or dense.bias is not None:
            raise SystemExit("the reference's method is measured with mode zero and without biases only")
        if dense.in_features % DOWN_ROWS:
            raise SystemExit(f"the kernel needs a multiple of {DOWN_ROWS} input channels: {dense.in_features}")
        self.weight = _input_major(dense.weight)
        self.kernel = kernel
        self.role, self.threshold = parameters.role or OTHER, parameters.threshold

    def skippable_weights(self) -> int:
        """The number of weights that can be skipped."""
        return self.weight.numel()

    def compared(self, x: Tensor) -> Tensor:
        """What the threshold is compared with."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        if _is_one_token(x):
            return self.kernel(x, self.weight, x.abs() > self.threshold)
        return F.linear(F.hardshrink(x, self.threshold), self.weight.t())


def install_cats(model: nn.Module, kernels: CatsKernels, sparsity: float, calibration: Tensor) -> None:
    """Has every gated FFN of `model` run as CATS does, in place.

    Args:
        sparsity: the fraction of the neurons to prune. Each layer's threshold is found behind sparse ones.
        calibration: token ids `[samples, tokens]`.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if all(hasattr(child, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
                setattr(module, name, CatsFeedForward(child, kernels))

    def find_threshold(block: Any, args: tuple[Tensor]) -> None:
        magnitudes = block.compared(args[0]).abs().flatten().float()
        block.threshold = float(magnitudes.kthvalue(max(1, round(sparsity * magnitudes.numel()))).values)

    _forward(model, calibration, find_threshold)
    _forward(model, calibration[:1, :1])  # the kernels tune themselves on what they see first


def install_reference(model: nn.Module, kernels: CatsKernels, layers: Mapping[str, LayerParameters]) -> None:
    """Has the `layers` of `model`, named by their paths, run as the reference's, in place."""
    for path, parameters in layers.items():
        parent, _, name = path.rpartition(".")
        dense = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, ReferenceLinear(dense, parameters, kernels.linear))
        del dense
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    _forward(model, torch.zeros((1, 1), dtype=torch.long, device=embeddings.weight.device))


def pruned_fractions(model: nn.Module, ids: Tensor) -> RealizedSparsity:
    """What the baseline layers of `model` skip on the tokens `ids` [1, tokens]; of CATS, fractions of the neurons."""
    found: dict[str, LayerSparsity] = {}
    paths = {module: path for path, module in model.named_modules()}

    def count(layer: Any, args: tuple[Tensor]) -> None:
        pruned = layer.compared(args[0]).abs() <= layer.threshold
        skipped = float(pruned.float().mean())
        found[paths[layer]] = LayerSparsity(layer.role, layer.skippable_weights(), skipped)

    _forward(model, ids, count)
    return RealizedSparsity(found)


@torch.no_grad()
def _forward(model: nn.Module, ids: Tensor, before_layer: Callable[..., None] | None = None) -> None:
    """One forward; `before_layer(layer, args)` is called before that of every baseline layer."""
    layers = [module for module in model.modules() if isinstance(module, CatsFeedForward | ReferenceLinear)]
    handles = [layer.register_forward_pre_hook(before_layer) for layer in layers] if before_layer else []
    try:
        model(ids, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()


def _input_major(weight: Tensor) -> nn.Parameter:
    """`[out, in]` to `[in, out]`, contiguous, with spare memory behind it: the last block of columns may end there."""
    out_features, in_features = weight.shape
    memory = weight.new_zeros((in_features + -(-DOWN_COLUMNS // out_features), out_features), requires_grad=False)
    memory[:in_features] = weight.detach().t()
    return nn.Parameter(memory[:in_features], requires_grad=False)


def _is_one_token(x: Tensor) -> bool:
    return x.shape[:-1].numel() == 1
