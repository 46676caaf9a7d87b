"""Targets: which layers are to be pruned, and how much; from roles, from patterns on paths, or from an allocation."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..errors import SCAPError, printable
from .config import PATTERN, SCAPConfig, Target
from .roles import ROLES, Role, find_role
from .sites import Layer, Layers, Site


logger = logging.getLogger(__name__)

# Layers without a role that a message lists.
_LISTED = 12


# Of fewer tokens no threshold is taken: a token is a thousand activations, but they are alike.
FEW_TOKENS = 64


@dataclass(frozen=True)
class Group:
    """The layers of one site with one target: they prune alike.

    Args:
        site, layers, target: the layers by module path.
        pool: names the groups whose statistics stand in together where this one sees too little, see `Layer`.
        enough: how many activations it has to see.
    """

    site: Site
    layers: tuple[str, ...]
    target: Target
    pool: str | None = None
    enough: int = 1

    @property
    def key(self) -> str:
        """Identifies the group within its model."""
        return self.layers[0]


def name_roles(layers: Layers, config: SCAPConfig) -> Layers:
    """`layers` with the roles that the config names."""
    if not config.roles:
        return layers
    prunable = {path: replace(layer, role=config.role(path, layer.role)) for path, layer in layers.prunable.items()}
    return replace(layers, prunable=prunable)


def choose_targets(layers: Layers, config: SCAPConfig) -> dict[str, Target]:
    """The target of every layer that is to be pruned, by module path.

    Raises:
        SCAPError: if a pattern of the config matches no layer, or nothing is left to prune.
    """
    _check_patterns([*layers.prunable, *layers.dense], config)
    targets = select_targets({path: layer.role for path, layer in layers.prunable.items()}, config)
    roles = {layer.role for layer in layers.prunable.values()}
    # The experts of a model are what most of its FFN weights are.
    dense_roles = {
        path: config.role(path, "up" if path in layers.experts else find_role(path)) for path in layers.dense
    }
    skipped = select_targets(dense_roles, config)
    dense = {path: layers.dense[path] for path in skipped}
    if not layers.prunable:
        raise SCAPError(f"the model has no fully connected layer to prune{first_of(layers.dense)}")
    if not targets:
        patterns = "; the include and exclude patterns leave none of those" if roles & config.targets.keys() else ""
        raise SCAPError(
            "no fully connected layer is left to prune: the targets name "
            f"{', '.join(map(printable, config.targets))}, the model has "
            f"{', '.join(role for role in ROLES if role in roles) or 'no layer of a known role'}{patterns}"
            f"{first_of(dense)}{_without_role(layers)}"
        )
    if dense:
        logger.warning("%d layers are left dense%s", len(dense), first_of(dense))
    for name in config.targets:
        if name in ROLES and name not in roles:
            logger.info("the model has no layer of role %s", name)
    return targets


def select_targets(roles: Mapping[str, Role | None], config: SCAPConfig) -> dict[str, Target]:
    """Which of the layers (role by module path) are to be pruned, and how much."""
    patterns = config.pattern_targets()
    found = {}
    for path, role in roles.items():
        named = next((target for pattern, target in patterns.items() if re.search(pattern, path)), None)
        target = named or (config.targets.get(role) if role is not None else None)
        if target is not None and target.sparsity > 0 and not is_excluded(path, config):
            found[path] = target
    return found


def is_excluded(path: str, config: SCAPConfig) -> bool:
    """Whether the include and exclude patterns say that the layer at `path` is to be left as it is."""
    included = not config.include or any(re.search(pattern, path) for pattern in config.include)
    return not included or any(re.search(pattern, path) for pattern in config.exclude)


def make_groups(
    sites: Iterable[Site], targets: Mapping[str, Target], layers: Mapping[str, Layer] | None = None
) -> list[Group]:
    """The layers to prune, those of one site and target together; `layers` tell which of them share a pool."""
    known = layers or {}
    found = []
    for site in sites:
        by_target: dict[Target, list[str]] = {}
        for path in site.layers:
            if path in targets:
                by_target.setdefault(targets[path], []).append(path)
        for target, paths in by_target.items():
            first = known.get(paths[0])
            pool = None if first is None else first.pool
            enough = 1 if first is None or pool is None else FEW_TOKENS * first.in_features
            found.append(Group(site, tuple(paths), target, pool, enough))
    return found


def _without_role(layers: Layers) -> str:
    """Lists the layers without a role, numbers of blocks being `*`, and says how to name one; for a message."""
    counts = Counter(re.sub(r"\b\d+\b", "*", path) for path, layer in layers.prunable.items() if layer.role is None)
    if not counts:
        return ""
    listed = ", ".join(
        f"{printable(path)} ({number})" if number > 1 else printable(path)
        for path, number in list(counts.items())[:_LISTED]
    )
    more = f" and {len(counts) - _LISTED} more" if len(counts) > _LISTED else ""
    example = re.escape(next(iter(counts))).replace(r"\*", r"\d+")
    return (
        f"; no role is known for {listed}{more}: name them by patterns, --scap-role 'up={printable(example)}$' "
        f"(roles={{pattern: role}} in SCAPConfig), or give {PATTERN}PATTERN as a target"
    )


def first_of(reasons: Mapping[str, str]) -> str:
    """The first of the layers that stay dense, for the end of a message."""
    return "".join(f"; {printable(path)}: {reason}" for path, reason in list(reasons.items())[:1])


def _check_patterns(paths: Iterable[str], config: SCAPConfig) -> None:
    paths = list(paths)
    named = (
        ("include", config.include),
        ("exclude", config.exclude),
        ("roles", config.roles),
        ("targets", [name.removeprefix(PATTERN) for name in config.targets if name.startswith(PATTERN)]),
    )
    for field, patterns in named:
        for pattern in patterns:
            if not any(re.search(pattern, path) for path in paths):
                raise SCAPError(
                    f"{field} pattern {printable(pattern)!r} matches no fully connected layer; the model has, for "
                    f"example, {', '.join(paths[:3]) or 'none'}"
                )
