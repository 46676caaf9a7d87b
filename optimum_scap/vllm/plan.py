"""What vLLM is to do with the layers of a sparse checkpoint, and what it is refused for. Needs no vLLM."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..core.parameter_files import parameters_from_quantization_config
from ..core.parameters import LayerParameters, SCAPParameters
from ..errors import SCAPError, printable
from .stored import reader_for


_SOURCE = "quantization_config in config.json"


def served_parameters(fields: Mapping[str, Any]) -> SCAPParameters:
    """The SCAP parameters in the `quantization_config` of a checkpoint, if vLLM can run such a checkpoint.

    Raises:
        SCAPError: naming the field that is damaged, or the layers that cannot be run.
    """
    from ..torch.expert_layers import is_of_experts

    if fields.keys() - {"quant_method"} == {"quantization_config"}:
        raise SCAPError(f"{_SOURCE}: there are no SCAP parameters beside the integer weights")
    parameters = parameters_from_quantization_config(dict(fields), _SOURCE)
    if parameters.quantization_config is not None:
        try:
            reader_for(parameters.quantization_config)
        except SCAPError as error:
            raise SCAPError(f"{_SOURCE}: {error}") from error
    experts = sorted(path for path in parameters.layers if is_of_experts(path))
    if experts:
        raise SCAPError(
            f"{_SOURCE}: under vLLM experts cannot be pruned: {printable(experts[0])} and {len(experts) - 1} more; "
            "export the model with them left dense (`--scap-exclude experts`), or load this one with transformers"
        )
    heads = sorted(path for path, layer in parameters.layers.items() if layer.role == "head")
    if heads:
        raise SCAPError(
            f"{_SOURCE}: under vLLM the head cannot be pruned: {printable(heads[0])}; "
            "export the model with it left dense"
        )
    return parameters


def paths_within(prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """The checkpoint's layers that are one layer of vLLM.

    Args:
        prefix: vLLM's path of the layer, `model.layers.0.self_attn.qkv_proj`.
        packed: the names that one of vLLM's layers has in the checkpoint, in order: `{"qkv_proj": ["q_proj", ...]}`.
    """
    parent, dot, name = prefix.rpartition(".")
    return [f"{parent}{dot}{part}" for part in packed.get(name, (name,))]


def layers_within(
    parameters: SCAPParameters, prefix: str, packed: Mapping[str, Sequence[str]]
) -> list[LayerParameters | None] | None:
    """The parameters of what `paths_within` names, None for a part that is dense; None if all of it is."""
    found = [parameters.layers.get(path) for path in paths_within(prefix, packed)]
    return found if any(layer is not None for layer in found) else None


def check_all_found(parameters: SCAPParameters, found: set[str]) -> None:
    """Checks that each pruned layer of the checkpoint was found in vLLM's model.

    Raises:
        SCAPError: naming one that was not.
    """
    lost = sorted(parameters.layers.keys() - found)
    if lost:
        raise SCAPError(
            f"{_SOURCE}: vLLM's model has no layer {printable(lost[0])} to prune ({len(lost)} such layers in all)"
        )
