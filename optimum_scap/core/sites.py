"""Layers and sites: what can be pruned in a model, before anything is known about how much.

A site is one input (a tensor) with the layers that read it: q, k and v of an attention block, gate and up of a gated
one, most others alone. A backend finds the sites of a model once; they are kept in the parameters, so that nobody has
to find out again which layers may run together.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .roles import SHARED_INPUTS, Role, find_role


# Names in front of a model that a head or a wrapper may add.
_DEEPEST_HEAD = 4


@dataclass(frozen=True)
class Layer:
    """A fully connected layer that can be pruned.

    Args:
        path: its module path.
        role: what it does in its block; None if that is not known, so that only patterns can select it.
        in_features, out_features: shape of its weights.
        pool: of single experts: what names all experts of their layer. Where one sees too little, what all of them see
            stands in.
    """

    path: str
    role: Role | None
    in_features: int
    out_features: int
    pool: str | None = None


@dataclass(frozen=True)
class Layers:
    """The fully connected layers of a model.

    Args:
        prunable: by module path, in the order of execution or definition.
        dense: why others cannot be pruned, by module path.
        experts: those of the latter that hold the experts of a mixture-of-experts model.
    """

    prunable: Mapping[str, Layer]
    dense: Mapping[str, str] = field(default_factory=dict)
    experts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Site:
    """One input, for all the layers that read it: their module paths, in the order in which they are reached."""

    layers: tuple[str, ...]

    @property
    def key(self) -> str:
        """Identifies the site within its model."""
        return self.layers[0]


def sites_by_name(paths: Iterable[str]) -> list[Site]:
    """The sites of layers of which only the names are known, as files say that were written before they held sites.

    Layers of one parent module whose roles share an input in every known block (q, k and v; gate and up) make one.
    """
    paths = list(paths)
    by_parent: dict[str, dict[Role | None, list[str]]] = {}
    for path in paths:
        by_parent.setdefault(path.rpartition(".")[0], {}).setdefault(find_role(path), []).append(path)
    together: dict[str, Site] = {}
    for by_role in by_parent.values():
        for roles in SHARED_INPUTS:
            if all(len(by_role.get(role, [])) == 1 for role in roles):
                site = Site(tuple(by_role[role][0] for role in roles))
                together.update(dict.fromkeys(site.layers, site))
    return list(dict.fromkeys(together.get(path, Site((path,))) for path in paths))


def layers_in_one_block(sites: Iterable[Site], among: Iterable[str]) -> list[tuple[str, ...]]:
    """Layers that can run as one: of one site, of one parent module, and `among` those given; two at least.

    Only whole families that share an input in every known block (q, k and v; gate and up), in that order.
    """
    wanted = set(among)
    found = []
    for site in sites:
        families: Sequence[Site] = sites_by_name([path for path in site.layers if path in wanted])
        found += [family.layers for family in families if len(family.layers) > 1]
    return found


def match_paths(wanted: Iterable[str], present: Iterable[str]) -> dict[str, str | None]:
    """The module path in a model for each path that parameters name, None where there is none.

    A head that was added to the model, or taken away, puts all paths behind one more or fewer name (`model.`,
    `bert.`): a path that is not there is looked for with and without the same beginning as the others.
    """
    wanted, there = list(wanted), dict.fromkeys(present)
    missing = [path for path in wanted if path not in there]
    best: dict[str, str | None] = {}
    for beginning in _beginnings(missing[:1], there):
        moved = {path: _moved(path, beginning) for path in missing}
        found = {path: name for path, name in moved.items() if name in there}
        if len(found) > len(best):
            best = dict(found)
    return {path: path if path in there else best.get(path) for path in wanted}


def _beginnings(paths: Iterable[str], present: Iterable[str]) -> list[str]:
    """What may stand before paths in one model and not in the other; `-` in front of what is to be taken away."""
    found = []
    for path in paths:
        parts = path.split(".", _DEEPEST_HEAD)
        found += [f"-{'.'.join(parts[:number])}." for number in range(1, len(parts))]
        found += [name.removesuffix(path) for name in present if name.endswith(f".{path}")]
    return found


def _moved(path: str, beginning: str) -> str:
    return path.removeprefix(beginning[1:]) if beginning.startswith("-") else f"{beginning}{path}"
