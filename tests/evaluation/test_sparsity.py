"""What layers skip, summarized."""

import pytest

from optimum_scap import SCAPConfig, SCAPParameters
from optimum_scap.core.parameters import LayerParameters
from optimum_scap.evaluation.sparsity import LayerSparsity, RealizedSparsity, realized


def layer(role: str | None, target: float) -> LayerParameters:
    return LayerParameters(role=role, estimator="zero", target_sparsity=target, mode=0.0, threshold=1.0)


def parameters(**layers: LayerParameters) -> SCAPParameters:
    config = SCAPConfig(targets={"up": 0.25, r"re:head$": 0.5, "re:first": 0.75, "re:last": 0.75})
    return SCAPParameters(version="1", config=config, layers={path.replace("_", "."): layers[path] for path in layers})


def test_the_mean_per_role_the_share_of_weights_and_the_largest_miss() -> None:
    found = RealizedSparsity(
        {
            "0.up": LayerSparsity("up", weights=100, skipped=0.25, target=0.25),
            "1.up": LayerSparsity("up", weights=100, skipped=0.375, target=0.25),
            "0.down": LayerSparsity("down", weights=200, skipped=0.5, target=0.625),
            "head": LayerSparsity("other", weights=600, skipped=0.125),
        }
    )
    assert found.by_role == {"up": 0.3125, "down": 0.5, "other": 0.125}
    assert found.targets == {"up": 0.25, "down": 0.625}
    assert found.overall == (25 + 37.5 + 100 + 75) / 1000
    assert found.largest_miss == 0.125
    overall = "23.8% of the weights of pruned layers"
    assert found.describe() == f"up 31.2%, down 50.0%, other 12.5%; {overall}"
    described = f"up 31.2% (25%), down 50.0% (62.5%), other 12.5%; {overall}, largest miss of a target 0.125"
    assert found.describe(targets=True) == described


def test_nothing_was_skipped() -> None:
    nothing = RealizedSparsity()
    assert nothing.by_role == {} and nothing.overall is None and nothing.largest_miss is None
    assert nothing.describe() == ""
    with pytest.raises(AttributeError):
        nothing.layers = {}  # type: ignore[misc]


def test_a_layer_without_a_role_goes_under_its_pattern() -> None:
    known = parameters(lm_head=layer(None, 0.5), up=layer("up", 0.25), first=layer(None, 0.75), odd=layer(None, 0.1))
    assert known.group("lm.head") == r"re:head$"
    assert known.group("up") == "up"
    assert known.group("first") == "other"  # two patterns have this target
    assert known.group("odd") == "other"  # an allocation moved it
    skipped = {"lm.head": 0.5, "up": 0.25, "first": 0.75, "odd": 0.125}
    found = realized(skipped, dict.fromkeys(skipped, 8), known)
    assert found.by_role == {r"re:head$": 0.5, "up": 0.25, "other": 0.4375}
    assert found.layers["odd"] == LayerSparsity("other", 8, 0.125, 0.1)


def test_a_model_that_carries_no_parameters() -> None:
    found = realized({"layers.0.mlp.up_proj": 0.5, "layers.0.x": 0.25}, {"layers.0.mlp.up_proj": 4, "layers.0.x": 4})
    assert found.by_role == {"up": 0.5, "other": 0.25}
    assert found.targets == {} and found.largest_miss is None and found.overall == 0.375
