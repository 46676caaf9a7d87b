"""The report: ratios per repeat, its JSON, and what it refuses."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from optimum_scap.evaluation.machine import describe_machine
from optimum_scap.evaluation.report import Quantity, Report, Spread
from optimum_scap.evaluation.sparsity import LayerSparsity, RealizedSparsity


# The machine slows down from repeat to repeat: only ratios per repeat see that SCAP is twice as fast.
DECODE = Quantity(name="decode", unit="tokens/s", values={"dense": (40.0, 20.0, 10.0), "SCAP": (80.0, 40.0, 25.0)})
MEMORY = Quantity(name="peak memory", unit="MiB", values={"dense": (1000.0,), "SCAP": (750.0,)})
GENERATE = Quantity(name="generate", values={"SCAP": (3.0, 4.0, 5.0)})


def report(**changes: Any) -> Report:
    fields: dict[str, Any] = {
        "machine": {"cpu": "a CPU", "cores": "2"},
        "settings": {"prompt_tokens": [128], "repeats": 3},
        "contestants": {"dense": "folder", "SCAP": "folder-scap"},
        "baseline": "dense",
        "quantities": (DECODE, MEMORY, GENERATE),
        "sparsity": {"SCAP": RealizedSparsity({"0.up": LayerSparsity("up", 100, 0.25, 0.375)})},
    }
    return Report(**(fields | changes))


def test_the_ratio_is_the_median_of_the_ratios_per_repeat() -> None:
    shaken = Quantity(name="x", values={"dense": (1.0, 2.0, 4.0), "SCAP": (4.0, 2.0, 2.0)})
    assert shaken.ratio("SCAP", "dense") == Spread(1.0, 0.5, 4.0)
    # here the quotient of the medians is not the median of the quotients
    assert DECODE.ratio("SCAP", "dense") == Spread(2.0, 2.0, 2.5)
    uneven = Quantity(name="x", values={"dense": (1.0, 10.0, 100.0), "SCAP": (30.0, 10.0, 200.0)})
    assert uneven.ratio("SCAP", "dense") == Spread(2.0, 1.0, 30.0)
    assert uneven.spread("SCAP") == Spread(30.0, 10.0, 200.0)
    assert MEMORY.ratio("SCAP", "dense") == Spread(0.75, 0.75, 0.75)
    assert GENERATE.ratio("SCAP", "dense") is None and GENERATE.spread("dense") is None
    nothing = Quantity(name="accuracy", values={"dense": (0.0,), "SCAP": (0.5,)})
    assert nothing.ratio("SCAP", "dense") is None


def test_quartiles_leave_the_slowest_steps_out() -> None:
    values = (1.0, 2.0, 3.0, 4.0, 100.0)
    steps = Quantity(name="step", values={"dense": (1.0,) * 5, "SCAP": values}, quartiles=True)
    assert steps.spread("SCAP") == steps.ratio("SCAP", "dense") == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0], quartiles=True) == Spread(7.0, 7.0, 7.0)


@pytest.mark.parametrize(
    ("spread", "plain", "ratio"),
    [
        (Spread(12.3456, 11.0, 13.5), "12.35 [11, 13.5]", "12.346x [11.000, 13.500]"),
        (Spread(0.75, 0.75, 0.75), "0.75", "0.750x"),
        (Spread(12345.6, 9999.0, 20000.4), "12346 [9999, 20000]", "12345.600x [9999.000, 20000.400]"),
    ],
)
def test_spreads_are_printed_with_their_ends(spread: Spread, plain: str, ratio: str) -> None:
    assert str(spread) == plain and spread.as_ratio() == ratio


def test_json_holds_values_and_ratios_and_gives_the_report_again() -> None:
    written = json.loads(report().to_json())
    assert list(written) == ["machine", "settings", "contestants", "baseline", "quantities", "sparsity", "ratios"]
    assert written["quantities"][0]["values"]["SCAP"] == [80.0, 40.0, 25.0]
    assert written["ratios"] == {
        "decode": {"SCAP": {"median": 2.0, "low": 2.0, "high": 2.5}},
        "peak memory": {"SCAP": {"median": 0.75, "low": 0.75, "high": 0.75}},
        "generate": {},
    }
    assert written["sparsity"]["SCAP"]["by_role"] == {"up": 0.25}
    assert written["sparsity"]["SCAP"]["overall"] == 0.25 and written["sparsity"]["SCAP"]["largest_miss"] == 0.125
    written["ratios"]["decode"]["SCAP"]["median"] = 99.0  # counted again, not believed
    read = Report.model_validate(written)
    assert read == report() and read.ratios == report().ratios
    assert Report.model_validate_json(report().to_json()) == report()


def test_rows_are_found_by_name() -> None:
    assert report().quantity("peak memory") is MEMORY
    with pytest.raises(KeyError, match="load"):
        report().quantity("load")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"baseline": "none"}, "none: no contestant is called so"),
        ({"contestants": {"dense": "folder"}}, "SCAP: no contestant is called so"),
        ({"quantities": (DECODE, DECODE)}, "two quantities have the same name"),
        ({"contestants": {}}, "at least 1 item"),
    ],
)
def test_what_belongs_to_nobody_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        report(**changes)


NAN = float("nan")


@pytest.mark.parametrize("values", [{"dense": (1.0, 2.0), "SCAP": (1.0,)}, {"dense": ()}, {}, {"dense": (NAN,)}])
def test_repeats_that_do_not_belong_together_are_refused(values: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ValidationError):
        Quantity(name="decode", values=values)


def test_the_machine_is_described() -> None:
    found = describe_machine()
    assert {"cpu", "cores", "date", "python", "openvino", "torch", "optimum-scap"} <= found.keys()
    assert found["cpu"] and int(found["cores"]) >= 1 and "gpu" not in found
