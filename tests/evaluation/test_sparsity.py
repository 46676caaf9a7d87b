"""The summary of what layers skip."""

import pytest

from optimum_scap.evaluation.sparsity import by_role, describe


def test_the_mean_per_role() -> None:
    skipped = {"0.up": 0.2, "1.up": 0.4, "0.down": 0.5, "head": 0.1}
    found = by_role(skipped, {"0.up": "up", "1.up": "up", "0.down": "down", "head": None})
    assert found == pytest.approx({"up": 0.3, "down": 0.5, "other": 0.1})
    assert describe(found) == "up 30.0%, down 50.0%, other 10.0%"
    assert by_role({}, {}) == {} and describe({}) == ""
