"""How far the sparse model is from the dense one: KL(dense || sparse) of the next token, summed over all tokens.

One model in memory: both passes run on the same weights. What enters the head is computed for all tokens, logits only
for a piece of them at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import SCAPError, first_line
from ..prunable import in_features
from .layers import LearnedLayers


# Elements of the logits that are held at a time.
_LOGITS_ON_CPU, _LOGITS_ON_GPU = 2**24, 2**27
# Tokens of a pass; more fill the cores of a CPU no better.
_TOKENS_ON_CPU, _TOKENS_ON_GPU = 512, 4096


class Objective:
    """KL(dense || sparse) of a causal language model.

    Args:
        model: the model, without wrappers; frozen, see `frozen`.
        layers: its layers, installed.

    Raises:
        SCAPError: if it is no causal language model of transformers.
    """

    def __init__(self, model: Any, layers: LearnedLayers) -> None:
        self._model = model
        self._layers = layers
        self._head = head_of(model)
        self._device: torch.device = model.get_input_embeddings().weight.device
        on_gpu = self._device.type != "cpu"
        self.tokens_at_once = _TOKENS_ON_GPU if on_gpu else _TOKENS_ON_CPU
        self._elements = _LOGITS_ON_GPU if on_gpu else _LOGITS_ON_CPU
        self._logits: Callable[[Tensor], Tensor] | None = None

    def hidden(self, ids: Tensor, sparse: bool) -> Tensor:
        """What enters the head, or the logits of a model that does more than multiply behind it; `[tokens, width]`.

        Args:
            ids: `[batch, tokens]`.
            sparse: whether layers prune.
        """
        if self._logits is None:
            self._find_head(ids)
        self._layers.sparse = sparse
        run = self._model if self._logits is _itself else self._model.base_model
        return self._run(run, ids)

    def dense(self, ids: Tensor) -> Tensor:
        """`hidden` of the dense model, without gradients."""
        with torch.no_grad():
            return self.hidden(ids, sparse=False)

    def divergence(self, dense: Tensor, sparse: Tensor, backward: bool) -> float:
        """The sum over all tokens; with `backward` gradients are added to all that is learned.

        Args:
            dense, sparse: what `hidden` gave, `[tokens, width]`.
            backward: whether gradients are wanted.
        """
        assert self._logits is not None
        leaf = sparse.detach().requires_grad_(backward)
        total = torch.zeros((), device=leaf.device)
        rows = max(1, self._elements // self._vocabulary)
        for start in range(0, len(dense), rows):
            piece = slice(start, start + rows)
            with torch.no_grad():
                self._layers.sparse = False
                wanted = F.log_softmax(self._logits(dense[piece]).float(), dim=-1)
            with torch.set_grad_enabled(backward):
                self._layers.sparse = True
                found = F.log_softmax(self._logits(leaf[piece]).float(), dim=-1)
                loss = F.kl_div(found, wanted, reduction="sum", log_target=True)
                if backward:
                    loss.backward()
            total += loss.detach()
        if backward:
            self._layers.measured = None  # what is computed again is not counted again
            if sparse.requires_grad:
                sparse.backward(leaf.grad)
        return float(total)

    def _run(self, run: Any, ids: Tensor) -> Tensor:
        try:
            output = run(input_ids=ids.to(self._device), use_cache=False)
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise SCAPError(f"a {type(self._model).__name__} cannot be learned with: {first_line(error)}") from error
        found: Tensor = output[0]
        return found.reshape(-1, found.shape[-1])

    @torch.no_grad()
    def _find_head(self, ids: Tensor) -> None:
        """Some models scale or bound what their head computes: then the whole model gives the logits."""
        self._layers.sparse = False
        measured, self._layers.measured = self._layers.measured, None
        few = ids[:1, :8]
        logits = self._run(self._model, few).float()
        self._vocabulary = logits.shape[-1]
        self._logits = _itself
        if self._model.base_model is not self._model:
            hidden = self._run(self._model.base_model, few)
            if hidden.shape[-1] == in_features(self._head):
                own = self._head(hidden).float()
                spread = (own - own.mean(-1, keepdim=True)) - (logits - logits.mean(-1, keepdim=True))
                if own.shape == logits.shape and float(spread.abs().max()) < 0.01 * float(logits.std()):
                    self._logits = self._head
        self._layers.measured = measured


def _itself(logits: Tensor) -> Tensor:
    return logits


def head_of(model: Any) -> Any:
    """What computes the logits of a causal language model of transformers.

    Raises:
        SCAPError: if it is none.
    """
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    if head is None or not hasattr(model, "base_model") or getattr(model.config, "is_encoder_decoder", False):
        raise SCAPError(f"learning needs a causal language model of transformers, not a {type(model).__name__}")
    return head


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A context in which no parameter of `model` takes gradients, and all of it is in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
