"""Learned calibration: thresholds, biases and gains that bring the sparse model's logits near to the dense one's.

Measured on SmolLM2 at 42 % of its FFN weights, this removes two thirds of what published SCAP loses, at no cost at run
time: thresholds are numbers as before, biases are added where biases are, gains are folded into the weights.

    pruning     the operation with gradients for thresholds
    layers      what is learned, and the forwards that apply it
    objective   KL(dense || sparse)
    total       the sparsity that is held
    windows     the text
    memory      activations that are computed again
    training    the steps
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ...core.backend import Learned
from ...core.config import SCAPConfig
from ...core.criterion import Criterion
from ...core.targets import Group
from ...core.totals import weighted_total
from ...errors import SCAPError, printable
from ..expert_layers import ExpertLayer
from ..owners import Owners
from ..prunable import is_linear
from ..wrappers import unwrap
from .layers import LearnedLayers, adjusted, fold_gains
from .memory import checkpointed
from .objective import Objective, frozen, head_of
from .total import Total
from .training import Training
from .windows import split, token_sequences


__all__ = ["adjusted", "check_can_learn", "fold_gains", "learn"]

# Of held-out text, in steps.
_HELD_OUT_STEPS = 2


def check_can_learn(
    model: nn.Module, modules: Mapping[str, nn.Module], config: SCAPConfig, paths: Iterable[str]
) -> None:
    """Checks that a model can learn what `config` says.

    Args:
        model: the model.
        modules: its fully connected layers by module path.
        config: what to learn.
        paths: of the layers to prune.

    Raises:
        SCAPError: saying what to learn instead.
    """
    inner: Any = unwrap(model)
    head_of(inner)
    if any(value.is_meta for value in (*inner.parameters(), *inner.buffers())):
        raise SCAPError("learning needs all weights in memory, and some are offloaded or not loaded")
    paths = list(paths)
    of_experts = [path for path in paths if isinstance(modules[path], ExpertLayer)]
    if of_experts:
        raise SCAPError(
            f"layer {printable(of_experts[0])} belongs to a mixture of experts, of which nothing is learned: leave "
            "them dense (--scap-exclude), or learn nothing"
        )
    if "gains" not in config.learn:
        return
    owners = Owners(inner)
    instead = "learn thresholds and biases (--scap-learn thresholds,biases), which any weights take"
    for path in paths:
        module = modules[path]
        if not is_linear(module) or not module._parameters.get("weight", None).is_floating_point():  # type: ignore[union-attr]
            raise SCAPError(
                f"gains are folded into floating-point weights, and those of layer {printable(path)} are quantized: "
                f"{instead}, or start from the float model, without --weight-format"
            )
        if owners[module.weight] > 1:
            raise SCAPError(
                f"gains are folded into the weights, and those of layer {printable(path)} are another layer's as "
                f"well: {instead}, or leave it dense"
            )


def learn(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    groups: Sequence[Group],
    criteria: Mapping[str, Criterion],
    weights: Mapping[str, int],
    samples: Iterable[Any],
    config: SCAPConfig,
) -> Learned:
    """Learns what `config.learn` says; the model itself stays as it is, see `core.backend.Backend.learn`.

    Args:
        model: the dense model.
        modules: its fully connected layers by module path.
        groups: what is pruned.
        criteria: what to start from, by group key.
        weights: how many each group reads, by group key.
        samples: model inputs with token ids.
        config: what to learn, and how long.

    Raises:
        SCAPError: if the samples hold no text, or the model cannot run on them.
    """
    inner: Any = unwrap(model)
    learned_from, held_out = split(token_sequences(samples), _HELD_OUT_STEPS * config.learn_tokens)
    layers = LearnedLayers(modules, groups, criteria, config.learn)
    targets = {group.key: group.target.sparsity for group in groups}
    total = Total(weighted_total(targets, weights), weights)
    with frozen(inner), layers.installed():
        objective = Objective(inner, layers)
        with checkpointed(inner, layers, objective.tokens_at_once):
            return Training(objective, layers, total, config).run(learned_from, held_out)
