"""The layers of a mixture of experts, whose weights are three-dimensional parameters of one module.

transformers 5 holds them as `gate_up_proj [experts, 2 * intermediate, hidden]` and `down_proj [experts, hidden,
intermediate]` (`transformers.integrations.moe.use_experts_implementation` says how they may vary). What prunes their
inputs is a module without weights per layer, a child of that module: `EXPERTS.gate`, `EXPERTS.up` and `EXPERTS.down`
for all experts together, or `EXPERTS.3.gate` and so on for single ones. Where gate and up cannot be told apart, since
the module combines them by a formula of its own, `up` is both.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import ApplyTo, Experts
from ..core.parameters import LayerParameters
from .criterion import prune
from .linear import Pruned


_WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ExpertLayer(nn.Module):
    """The input of one layer of all experts, or of one; left as it is.

    Args:
        owner: the module that holds the weights.
        name: `gate`, `up` or `down`.
        expert: the number of the expert; None for all.
    """

    owner: Any

    def __init__(self, owner: nn.Module, name: str, expert: int | None = None) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not a child
        self.name, self.expert = name, expert
        self.in_features, self.out_features = shape(owner, name)

    @property
    def path(self) -> str:
        """Relative to its owner."""
        return self.name if self.expert is None else f"{self.expert}.{self.name}"

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """`[rows, in_features]`, of which hooks may prune.

        Args:
            x: the input.
            tokens: which of the model's tokens each row belongs to; None if the rows are the tokens.
        """
        return x


class SCAPExpertLayer(ExpertLayer, Pruned):
    """An input that is pruned."""

    scap_parameters: LayerParameters
    scap_apply_to: ApplyTo
    scap_mode: float
    scap_threshold: float
    scap_scale: None = None
    scap_bias_correction: None = None

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        return prune(x, self.scap_mode, self.scap_threshold)

    def prepare(self) -> None:
        """See `_PrunedInput.prepare`; the first of the layers does it for all of them."""
        if next(iter(self.owner.scap_layers().values())) is self:
            self.owner.prepare()

    def extra_repr(self) -> str:
        parameters = self.scap_parameters
        return (
            f"{self.in_features}, {self.out_features}, mode={parameters.mode:.4g}, "
            f"threshold={parameters.threshold:.4g}, target_sparsity={parameters.target_sparsity:.3g}"
        )


def is_experts(module: Any) -> bool:
    """Whether `module` holds experts as transformers 5 does, with floating-point weights of its own."""
    if not all(hasattr(module, name) for name in ("num_experts", "has_gate", "has_bias", "is_transposed")):
        return False
    weights = [module._parameters.get(name) for name in (first_name(module), "down_proj")]
    return all(
        type(weight) is nn.Parameter and weight.dim() == 3 and weight.dtype in _WEIGHT_DTYPES for weight in weights
    )


def is_of_experts(path: str) -> bool:
    """Whether a layer of this path belongs to a mixture of experts."""
    return re.search(r"(^|\.)experts\.(\d+\.)?(gate|up|down)$", path) is not None


def is_of_one_expert(path: str) -> bool:
    """Whether a layer of this path would belong to one expert."""
    return re.search(r"\.\d+\.(gate|up|down)$", path) is not None


def first_name(experts: Any) -> str:
    """The name of the parameter that reads the input of the experts."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def tells_gate_from_up(experts: Any) -> bool:
    """Whether the experts compute `act_fn(gate) * up` of the halves of `gate_up_proj`."""
    gating = getattr(type(experts), "_apply_gate", None)
    return experts.has_gate and getattr(gating, "__module__", "") == "transformers.integrations.moe"


def layer_names(experts: nn.Module) -> tuple[str, ...]:
    """Names of the layers of each expert, those that read one input first."""
    return ("gate", "up", "down") if tells_gate_from_up(experts) else ("up", "down")


def shape(experts: Any, name: str) -> tuple[int, int]:
    """in_features and out_features of a layer of one expert."""
    weight = experts._parameters["down_proj" if name == "down" else first_name(experts)]
    features = (weight.shape[1], weight.shape[2]) if experts.is_transposed else (weight.shape[2], weight.shape[1])
    halved = name != "down" and tells_gate_from_up(experts)
    return features[0], features[1] // 2 if halved else features[1]


def make_layers(experts: Any, thresholds: Experts) -> Iterator[ExpertLayer]:
    """The layers that `experts`, a module that is dense, has: of all experts together, or of each."""
    for expert in (None,) if thresholds == "shared" else range(experts.num_experts):
        for name in layer_names(experts):
            yield ExpertLayer(experts, name, expert)


def run_experts(
    experts: Any,
    layers: dict[str, ExpertLayer],
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    count: Callable[[list[int]], None] | None = None,
) -> Tensor:
    """What the experts compute for any number of tokens, their inputs passing through `layers`.

    Args:
        experts: the module that holds the weights.
        layers: by path relative to `experts`; inputs without a layer stay as they are.
        x: `[tokens, hidden]`.
        top_k_index: `[tokens, k]`, the chosen experts; a number that no expert has, as one of another device, adds
            nothing.
        top_k_weights: `[tokens, k]`.
        count: is told how many tokens each expert was chosen for.

    Returns:
        `[tokens, hidden]`.
    """
    chosen = top_k_index.reshape(-1)
    order = torch.argsort(chosen, stable=True)
    tokens = order // top_k_index.shape[-1]
    sizes = torch.bincount(chosen, minlength=experts.num_experts)[: experts.num_experts].tolist()
    if count is not None:
        count(sizes)
    rows_of = list(tokens.split([*sizes, tokens.shape[0] - sum(sizes)])[:-1])
    shared: dict[str, Tensor] = {name: layers[name](x) for name in ("gate", "up") if name in layers}
    hidden = [
        _first(experts, layers, x, shared, expert, rows) for expert, rows in enumerate(rows_of) if rows.shape[0] > 0
    ]
    if not hidden:
        return torch.zeros_like(x)
    if "down" in layers:
        known = tokens[: sum(sizes)]
        hidden = list(layers["down"](torch.cat(hidden), known).split([size for size in sizes if size]))
    outputs = []
    for expert, values in zip((expert for expert, size in enumerate(sizes) if size), hidden, strict=True):
        layer = layers.get(f"{expert}.down")
        values = values if layer is None else layer(values, rows_of[expert])
        outputs.append(_product(experts, "down_proj", expert, values))
    known = order[: sum(sizes)]
    weighted = torch.cat(outputs) * top_k_weights.reshape(-1)[known, None]
    by_choice = weighted.new_zeros(order.shape[0], x.shape[-1]).index_copy(0, known, weighted)
    return by_choice.view(*top_k_index.shape, x.shape[-1]).sum(dim=1).to(x.dtype)


def _first(
    experts: Any, layers: dict[str, ExpertLayer], x: Tensor, shared: dict[str, Tensor], expert: int, rows: Tensor
) -> Tensor:
    """What enters `down` of one expert, `[rows, intermediate]`."""
    own = x[rows]
    inputs = {}
    for name in layer_names(experts)[:-1]:
        layer = layers.get(f"{expert}.{name}")
        inputs[name] = shared[name][rows] if name in shared else own if layer is None else layer(own, rows)
    name = first_name(experts)
    if "gate" not in inputs:
        product = _product(experts, name, expert, inputs["up"])
    elif _prune_alike(layers, expert):
        product = _product(experts, name, expert, inputs["gate"])
    else:
        gate = _product(experts, name, expert, inputs["gate"])
        up = _product(experts, name, expert, inputs["up"])
        half = gate.shape[-1] // 2
        product = torch.cat([gate[:, :half], up[:, half:]], dim=-1)
    return experts._apply_gate(product) if experts.has_gate else experts.act_fn(product)


def _prune_alike(layers: dict[str, ExpertLayer], expert: int) -> bool:
    """Whether gate and up are known to be given the same values."""
    gate, up = (layers.get(name) or layers.get(f"{expert}.{name}") for name in ("gate", "up"))
    if gate is None or up is None:
        return gate is up
    if isinstance(gate, SCAPExpertLayer) and isinstance(up, SCAPExpertLayer):
        return (gate.scap_mode, gate.scap_threshold) == (up.scap_mode, up.scap_threshold)
    return False  # hooks may do anything


def _product(experts: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = experts._parameters[name][expert]
    product = x @ weight if experts.is_transposed else nn.functional.linear(x, weight)
    return product + experts._parameters[f"{name}_bias"][expert] if experts.has_bias else product
