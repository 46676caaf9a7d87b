"""Runs a torch model over samples, and hands out what enters its layers through forward hooks."""

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.backend import Add, Collector, Counter, Visit
from ..core.criterion import KEEP_ALL, Criterion
from ..core.sites import Site
from ..core.targets import Group
from ..data.padding import Padding
from ..data.samples import describe_sample, inputs_of
from ..errors import SCAPError, first_line, raise_interruption_behind
from .blocks.experts import observed
from .criterion import prune, pruned_mask
from .expert_layers import ExpertLayer
from .linear import is_pruned


if TYPE_CHECKING:
    from numpy.typing import NDArray


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]


class ModelRun:
    """A model with hooks on some of its layers, without gradients, and with every module's own mode in the end.

    Args:
        model: the model.
        layers: the layers to hook, by module path.
        hooks: what is called with what enters them.
        all_logits: compute the logits of all tokens, where the model could leave out most of them.
        tokens: how many tokens each expert sees, by the id of its module; is added to.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        hooks: Mapping[str, Hook],
        all_logits: bool = False,
        tokens: dict[int, list[int]] | None = None,
    ) -> None:
        self._tokens = {} if tokens is None else tokens
        self._model = model
        self._layers = layers
        self._hooks = hooks
        self._stack = ExitStack()
        self._padding: _Padding | None = None
        self._options = _forward_options(model, all_logits)
        self._names = input_names(model)
        config = getattr(model, "config", None)
        self._encoder_decoder = getattr(config, "is_encoder_decoder", None)
        self._pad_token = getattr(config, "pad_token_id", None)

    def __enter__(self) -> "ModelRun":
        training = [module for module in self._model.modules() if module.training]
        self._model.eval()

        def restore() -> None:
            for module in training:
                module.training = True

        self._stack.callback(restore)
        self._stack.enter_context(torch.no_grad())
        # The code of torch.compile runs past new hooks.
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        dense = [layer for layer in self._layers.values() if isinstance(layer, ExpertLayer) and not is_pruned(layer)]
        self._stack.enter_context(observed(dense, self._tokens))
        for path, hook in self._hooks.items():
            handle = self._layers[path].register_forward_pre_hook(hook, with_kwargs=True)
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._padding = None
        self._stack.close()

    def forward(self, sample: Any) -> None:
        """Runs the model on one sample.

        Raises:
            SCAPError: if it cannot.
        """
        inputs = inputs_of(sample)
        named = inputs if isinstance(inputs, dict) else dict(zip(self._names, inputs, strict=False))
        self._padding = _Padding(named, self._encoder_decoder, self._pad_token)
        try:
            self._call(inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
            raise_interruption_behind(error)
            raise SCAPError(
                f"a {type(self._model).__name__} cannot run on the calibration sample {describe_sample(sample)}: "
                f"{first_line(error)}"
            ) from error

    def without_padding(self, path: str, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """What enters the layer at `path`, as `[kept tokens, channels]` where there is padding.

        Args:
            path: the layer.
            x: its input.
            tokens: which of the model's tokens each row belongs to, where the rows are others, as those of experts.
        """
        if self._padding is None:
            return x
        return self._padding.remove_from(path, x) if tokens is None else self._padding.remove_rows(path, x, tokens)

    def _call(self, inputs: dict[str, Any] | list[Any]) -> None:
        device = _input_device(self._model)
        if isinstance(inputs, dict):
            options = {name: value for name, value in self._options.items() if name not in inputs}
            self._model(**{name: _to(value, device) for name, value in inputs.items()}, **options)
        else:
            self._model(*[_to(value, device) for value in inputs], **self._options)


def find_sites(model: nn.Module, layers: Mapping[str, nn.Module], samples: Iterable[Any]) -> list[Site]:
    """Layers that are called with the very same tensor share a site; those that the first sample misses do not.

    Raises:
        SCAPError: if there are no samples, or the model cannot run on the first.
    """
    seen: list[tuple[weakref.ref[Tensor], list[str]]] = []

    def record(path: str) -> Hook:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(args, kwargs)
            for reference, paths in seen:
                if reference() is x:
                    if path not in paths:
                        paths.append(path)
                    return
            if not any(path in paths for _, paths in seen):
                seen.append((weakref.ref(x), [path]))

        return hook

    first = next(iter(samples), None)
    if first is None:
        raise SCAPError("the calibration dataset is empty")
    with ModelRun(model, layers, {path: record(path) for path in layers}) as run:
        run.forward(first)
    sites = [Site(tuple(paths)) for _, paths in seen]
    reached = {path for site in sites for path in site.layers}
    # Another sample may still reach the others; if none does, their statistics say so.
    return [*sites, *(Site((path,)) for path in layers if path not in reached)]


class TorchCollector(Collector):
    """Runs the model with criteria in force.

    A pruned activation takes the value of the mode, so that no bias has to be folded while the mode is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        groups: Sequence[Group],
        scales: "Mapping[str, NDArray[np.float32]]",
        tokens: dict[int, list[int]] | None = None,
    ) -> None:
        self._criteria: Mapping[str, Criterion] = {}
        self._scales = scales
        self._on_devices: dict[tuple[str, torch.device], Tensor] = {}
        self._visit: Visit | None = None
        hooks = {path: self._hook(group, path) for group in groups for path in group.layers}
        self._run = ModelRun(model, layers, hooks, _reads_head(model, [layers[path] for path in hooks]), tokens)

    def __enter__(self) -> "TorchCollector":
        self._run.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._run.__exit__(*exception)

    def set(self, criteria: Mapping[str, Criterion]) -> None:
        self._criteria = criteria

    def run(self, sample: Any, visit: Visit) -> None:
        self._visit = visit
        self._run.forward(sample)

    def _hook(self, group: Group, path: str) -> Hook:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = input_of(args, kwargs)
            assert self._visit is not None  # set before every forward
            if path == group.key:
                self._visit(group.key, self._run.without_padding(path, x, tokens_of(args)))
            criterion = self._criteria[group.key]
            if criterion is KEEP_ALL:
                return None
            scale = self._scale_on(group.key, x.device)
            return (prune(x, float(criterion.mode), float(criterion.threshold), scale),), {}

        return hook

    def _scale_on(self, key: str, device: torch.device) -> Tensor | None:
        if key not in self._scales:
            return None
        if (key, device) not in self._on_devices:
            self._on_devices[key, device] = torch.tensor(self._scales[key], device=device)
        return self._on_devices[key, device]


class TorchCounter(Counter):
    """Counts what the pruned layers of a sparse model skip."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self._add: Add | None = None
        hooks = {path: self._hook(path) for path in layers}
        self._run = ModelRun(model, layers, hooks, _reads_head(model, layers.values()))

    def __enter__(self) -> "TorchCounter":
        self._run.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._run.__exit__(*exception)

    def run(self, sample: Any, add: Add) -> None:
        self._add = add
        self._run.forward(sample)

    def _hook(self, path: str) -> Hook:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = self._run.without_padding(path, input_of(args, kwargs), tokens_of(args))
            pruned = pruned_mask(x, module.scap_mode, module.scap_threshold, module.scap_scale)
            channels = max(1, x.shape[-1])
            assert self._add is not None  # set before every forward
            self._add(path, float(pruned.sum()) / channels, pruned.numel() // channels)

        return hook


class _Padding(Padding):
    """The padding of one sample, and its removal from tensors on any device."""

    def __init__(self, inputs: Mapping[str, Any], encoder_decoder: bool | None, pad_token: int | None) -> None:
        super().__init__(inputs, encoder_decoder, pad_token)
        self._indices: dict[tuple[int, torch.device], Tensor] = {}

    def remove_from(self, path: str, x: Tensor) -> Tensor:
        """`[..., channels]` as it enters the layer `path`, to `[kept tokens, channels]` where there is padding."""
        rows = self.kept_rows(path, x.shape)
        if rows is None:
            return x
        key = (id(rows), x.device)
        if key not in self._indices:
            # Made on the host, they reach a GPU without synchronization.
            self._indices[key] = torch.from_numpy(rows).to(x.device, non_blocking=True)
        return x.reshape(-1, x.shape[-1]).index_select(0, self._indices[key])

    def remove_rows(self, path: str, x: Tensor, tokens: Tensor) -> Tensor:
        """`[rows, channels]` as it enters the layer `path` of experts, without the rows of padding."""
        mask = self._mask_for(path)
        if mask is None:
            return x
        kept = torch.from_numpy(mask.reshape(-1)).to(x.device, non_blocking=True)
        return x[kept[tokens]]


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The one argument that a fully connected layer is called with."""
    return next(iter((*args, *kwargs.values())))


def tokens_of(args: tuple[Any, ...]) -> Tensor | None:
    """What layers of experts are called with besides, see `ExpertLayer`."""
    return args[1] if len(args) > 1 else None


def _reads_head(model: Any, modules: Iterable[nn.Module]) -> bool:
    """Whether what computes the logits is among `modules`."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return False
    return head is not None and any(module is head for module in modules)


def _forward_options(model: nn.Module, all_logits: bool) -> dict[str, Any]:
    """Keyword arguments that spare a calibration what it does not need: a cache, and logits of every token."""
    try:
        names = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}
    options = {"use_cache": False} if all_logits else {"use_cache": False, "logits_to_keep": 1}
    return {name: value for name, value in options.items() if name in names and hasattr(model, "config")}


def input_names(model: nn.Module) -> list[str]:
    """The names of the inputs that `model` takes, in order; empty if it does not tell."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


def _input_device(model: nn.Module) -> torch.device | None:
    """Where the inputs belong; None where accelerate moves them itself."""
    if hasattr(model, "_hf_hook"):
        return None
    device = next((tensor.device for tensor in model.parameters()), None)
    return None if device is None or device.type == "meta" else device


def _to(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.as_tensor(value)
    if isinstance(value, Tensor) and device is not None:
        return value.to(device, non_blocking=True)
    return value
