"""What others put around a model and its layers: torch.compile, DataParallel, FSDP, PEFT's adapters.

Layers are known by the paths that they have in the model that is saved in the end, without any of it: thresholds that
were calibrated behind an adapter fit the merged model, and the other way round.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .prunable import in_features, is_fully_connected


# Children that hold what a wrapper of torch was put around.
_INNER_NAMES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and PEFT: the one that is saved, and adapters are merged into."""
    while (inner := _inner_model(model)) is not None:
        model = inner
    return model


def saved_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, by the paths of the model that is saved; wrappers are left out.

    A path comes several times where adapters bring copies of a module (PEFT's modules_to_save); the copy that runs
    comes last.
    """
    yield from _walk(unwrap(model), "", set())


def has_adapters(model: nn.Module) -> bool:
    """Whether `model` has adapters of PEFT, or prompts that PEFT trains."""
    return any(map(_is_from_peft, model.modules()))


def why_adapter_forbids(model: nn.Module) -> dict[nn.Module, str]:
    """Layers that their adapter calls with something else than it is called with itself, or not at all, and why.

    Thresholds found behind such an adapter would not hold when it is merged. Adapters are judged by running them on
    one row: PEFT has dozens, and most of them pass on what they get.
    """
    reasons: dict[nn.Module, str] = {}
    for wrapper in unwrap(model).modules():
        base = wrapper._modules.get("base_layer") if _is_from_peft(wrapper) else None
        if base is not None and not _passes_input_on(wrapper, base):
            reason = (
                f"its adapter ({_adapter_name(wrapper)}) does not pass its input on as it is: merge the adapter first"
            )
            reasons.update(dict.fromkeys(base.modules(), reason))
    return reasons


def _inner_model(model: nn.Module) -> nn.Module | None:
    for name in _INNER_NAMES:
        if name in model._modules:
            return model._modules[name]
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return model.module
    if _is_from_peft(model) and isinstance(inner := _peft_inner(model), nn.Module):
        return inner
    return None


def _peft_inner(model: Any) -> Any:
    """What a PeftModel or one of its tuners (LoraModel) is put around."""
    if hasattr(type(model), "get_base_model"):
        return model.get_base_model()
    return model._modules.get("model")


def _walk(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    inner = _adapted_name(module) or next((name for name in _INNER_NAMES if name in module._modules), None)
    if inner is None:
        yield path, module
    for copy in _copies(module):
        yield from _walk(copy, path, seen)
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, path if name == inner else f"{path}.{name}" if path else name, seen)


def _adapted_name(module: nn.Module) -> str | None:
    """The name of the child that an adapter of PEFT is put around, None if `module` is no adapter."""
    if not _is_from_peft(module):
        return None
    return next((name for name in ("base_layer", "original_module", "model") if name in module._modules), None)


def _copies(wrapper: nn.Module) -> list[nn.Module]:
    """All that can run in the place of `wrapper`, the one that does last; () if it is no modules_to_save of PEFT."""
    copies: Any = wrapper._modules.get("modules_to_save")
    original = wrapper._modules.get("original_module")
    if not _is_from_peft(wrapper) or original is None or copies is None:
        return []
    adapters: Any = [] if wrapper.disable_adapters else wrapper.active_adapters
    runs: nn.Module = next((copies[name] for name in adapters if name in copies), original)
    return [module for module in (original, *copies.values()) if module is not runs] + [runs]


def _is_from_peft(module: nn.Module) -> bool:
    return "peft" in sys.modules and type(module).__module__.partition(".")[0] == "peft"


def _adapter_name(wrapper: nn.Module) -> str:
    """`IA3`: PEFT names the classes of its layers Linear, too."""
    return type(wrapper).__module__.split(".")[-2]


@torch.no_grad()
def _passes_input_on(wrapper: nn.Module, base: nn.Module) -> bool:
    """Whether `wrapper` calls `base` with the very tensor that it is called with."""
    layer = base
    while _adapted_name(layer) is not None:
        layer = layer._modules["base_layer"]  # type: ignore[assignment]
    if not is_fully_connected(layer):
        return True  # no layer to prune
    weight = next((value for value in layer.parameters() if value.is_floating_point()), None)
    if weight is None:
        return True  # integers alone: what an adapter makes of them is not seen on one row
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None) if weight.is_meta else weight.device
    if device is None:
        return True  # nothing to run it with; a calibration says what it does not reach
    x = torch.ones(1, 1, in_features(layer), dtype=weight.dtype, device=device)
    received: list[Any] = []
    handle = base.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    training = [module for module in wrapper.modules() if module.training]
    try:
        wrapper.eval()(x)
    except Exception:  # dozens of adapters, and any may want more than a row
        return False
    finally:
        handle.remove()
        for module in training:
            module.training = True
    return [value is x for value in received] == [True]
