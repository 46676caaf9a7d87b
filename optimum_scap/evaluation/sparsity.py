"""Realized sparsity summarized: the one place for every backend, table and file."""

import statistics
from collections.abc import Mapping


def by_role(skipped: Mapping[str, float], roles: Mapping[str, str | None]) -> dict[str, float]:
    """{role: mean fraction of input channels skipped} of what `measure_sparsity` found per module path.

    Layers of no known role, which patterns can select, are `other`.
    """
    found: dict[str, list[float]] = {}
    for path, value in skipped.items():
        found.setdefault(roles.get(path) or "other", []).append(value)
    return {role: statistics.fmean(values) for role, values in found.items()}


def describe(sparsity: Mapping[str, float]) -> str:
    """`gate 35.0%, up 35.0%, down 55.0%`."""
    return ", ".join(f"{role} {value:.1%}" for role, value in sparsity.items())
