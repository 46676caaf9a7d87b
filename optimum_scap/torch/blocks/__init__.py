"""Blocks: modules whose layers run together. One file per kind, which says what it matches and how it is converted.

A further kind is a file with a class derived from `Block` and its entry in `kinds`. Which layers read one input is
found by what the modules read. Experts, which hold no layers as modules of their own, are in `experts`.
"""

from collections.abc import Iterable, Mapping

from torch import nn

from ...core.config import DenseLayers
from ...core.sites import Site, layers_in_one_block, sites_by_name
from .base import Block


def kinds() -> tuple[Block, ...]:
    """Every kind of block; the first that matches a module has it."""
    from .gated import GatedBlock
    from .shared_input import SharedInputBlock

    return GatedBlock(), SharedInputBlock()


def convert_blocks(
    model: nn.Module,
    modules: Mapping[str, list[nn.Module]],
    sites: Iterable[Site],
    dense_layers: DenseLayers,
    has_sites: bool = True,
) -> None:
    """Lets the layers of every block of `model` that share an input run together, in place.

    Args:
        model: a model whose layers to prune have been converted.
        modules: the modules of all layers that the sites name, by module path; several where adapters bring copies.
        sites: the layers that read one input.
        dense_layers: what becomes of layers that are not pruned, see SCAPConfig.
        has_sites: whether `sites` name every layer that may be touched, rather than the pruned ones alone.
    """
    from .dense import convert_dense_layers

    sites = list(sites)
    if dense_layers != "stock":
        only = {id(module) for found in modules.values() for module in found} if has_sites else None
        convert_dense_layers(model, None if dense_layers == "all" else only)
    by_parent: dict[int, tuple[nn.Module, tuple[str, ...]]] = {}
    paths = {id(module): path for path, found in modules.items() for module in found}
    for block in list(model.modules()):
        # accelerate's hooks replace the forward of an instance, and call what they found there
        if "forward" in vars(block):
            continue
        named = {name: paths[id(child)] for name, child in block.named_children() if id(child) in paths}
        by_path = {path: name for name, path in named.items()}
        for family in layers_in_one_block(sites, by_path):
            names = tuple(by_path[path] for path in family)
            by_parent.setdefault(id(block), (block, names))
    for block, names in by_parent.values():
        kind = next((kind for kind in kinds() if kind.matches(block, names)), None)
        if kind is not None:
            kind.convert(block, names)


def run_dense_layers_together(model: nn.Module) -> None:
    """What a sparse model does with its dense layers, for a model that is not sparse, in place: to tell one gain from
    the other.
    """
    modules: dict[str, list[nn.Module]] = {
        path: [module] for path, module in model.named_modules() if type(module) is nn.Linear
    }
    convert_blocks(model, modules, sites_by_name(modules), "all")


def has_replaced_dense_layers(model: nn.Module) -> bool:
    """Whether layers of `model` that are not pruned run, on a GPU, through a kernel of ours."""
    from .dense import DenseLinear

    return any(isinstance(module, DenseLinear) for module in model.modules())
