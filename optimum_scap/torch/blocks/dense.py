"""Layers that are left dense in a sparse model: one token on a GPU goes through a kernel of ours."""

from collections.abc import Container

from torch import Tensor, nn
from torch.nn import functional as F

from ...core.roles import find_role
from ..dispatch import is_one_row, may_call_kernel
from ..given import GivenOutput
from ..kernels import linear_group


class DenseLinear(nn.Linear):
    """An nn.Linear of a sparse model that is left dense."""

    scap_given: GivenOutput | None = None

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if is_one_row(input):
            given = self.scap_given
            if given is not None and (output := given.take(input)) is not None:
                return output
            if self.runs_our_kernel(input):
                return linear_group(input, [self.weight], [self.bias])[0]
        return F.linear(input, self.weight, self.bias)

    def kernel_weights(self) -> Tensor:
        """What the kernel is given."""
        return self.weight

    def runs_our_kernel(self, x: Tensor) -> bool:
        """Whether a forward of one token `x` `[..., in_features]` runs the kernel."""
        return _on_gpu(x) and self.weight.stride(-1) == 1 and may_call_kernel(x, self.weight)


def convert_dense_layers(model: nn.Module, only: Container[int] | None) -> None:
    """Makes the layers of `model` that have a known role, but for the head, and are not pruned DenseLinear, in place.

    `only`, if given, holds the ids of the modules that may be changed.
    """
    for path, module in model.named_modules():
        role = find_role(path)
        # accelerate's hooks replace the forward of an instance, and call what they found there
        is_plain = type(module) is nn.Linear and "forward" not in vars(module)
        # The head may share its weights with the embedding.
        if is_plain and role not in (None, "head") and (only is None or id(module) in only):
            module.__class__ = DenseLinear


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda
