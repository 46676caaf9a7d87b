"""Names are printed as they are, whatever rich would read into them."""

from pathlib import Path

import pytest

from optimum_scap import SCAPConfig, SCAPParameters
from optimum_scap.commands.tables import print_parameters, print_report
from optimum_scap.core.parameters import LayerParameters
from optimum_scap.evaluation.report import Quantity, Report
from optimum_scap.evaluation.sparsity import LayerSparsity, RealizedSparsity


NAMES = ["llama [int8]", "x[/b]", "[red]x[/red]", "a:smile:b", "%s {0}", "[link=x]y", "back\\[slash]"]


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    layer = LayerParameters(role="up", method="zero", target_sparsity=0.5, mode=0.0, threshold=1.0)
    config = SCAPConfig.from_spec("0.5", dataset=f"{name}.txt")
    found = SCAPParameters(version=name, config=config, layers={f"{name}.up_proj": layer})
    print_parameters(Path("models") / name, {f"{name}.xml": found})
    printed = capsys.readouterr().out
    assert f"{Path('models') / name / f'{name}.xml'} (optimum-scap {name})" in printed
    assert f"{name}.up_proj" in printed and f"calibrated on {name}.txt (64 samples" in printed


def test_control_characters_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    layer = LayerParameters(role="up", method="zero", target_sparsity=0.5, mode=0.0, threshold=1.0)
    config = SCAPConfig.from_spec("0.5", dataset="a\nb.txt")
    print_parameters(Path("m"), {"x": SCAPParameters(version="1", config=config, layers={"a\x1b[2J": layer})})
    printed = capsys.readouterr().out
    assert r"a\nb.txt" in printed and r"a\x1b[2J" in printed and "\x1b[2J" not in printed


def test_a_layer_without_a_role_is_shown_under_its_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    layer = LayerParameters(role=None, method="zero", target_sparsity=0.5, mode=0.0, threshold=1.0)
    config = SCAPConfig(targets={r"re:\[red\]$": 0.5}, dataset="a.txt")
    print_parameters(Path("m"), {"x": SCAPParameters(version="1", config=config, layers={"a[red]": layer})})
    printed = capsys.readouterr().out
    assert r"re:\[red\]$" in printed and "None" not in printed


def report(first: str, second: str) -> Report:
    speeds = {first: (1.0, 2.0, 4.0), second: (2.0, 5.0, 8.0)}
    return Report(
        machine={"cpu": "a CPU", "cores": "2"},
        contestants=dict.fromkeys(speeds, "m"),
        baseline=first,
        quantities=(
            Quantity(name="decode", unit="tokens/s", values=speeds),
            Quantity(name="generate", values={second: (7.0,)}),
        ),
        sparsity={second: RealizedSparsity({"0.up": LayerSparsity("up", 10, 0.5, 0.4)})},
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_report(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(report(first="dense", second=name))
    printed = capsys.readouterr().out
    assert name in printed and f"{name} skips up 50.0%; 50.0% of" in printed
    assert "2 [1, 4]" in printed and "5 [2, 8]" in printed and "2.000x [2.000, 2.500]" in printed
    assert "times dense" in printed and "cpu a CPU, cores 2" in printed


def test_columns_are_contestants_and_rows_quantities(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(report(first="dense", second="SCAP"), targets=True)
    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if "│" in line]
    assert lines == [
        ["decode, tokens/s", "2 [1, 4]", "5 [2, 8]"],
        ["", "", "2.000x [2.000, 2.500]"],
        ["generate", "", "7"],
    ]
    assert "SCAP skips up 50.0% (40%)" in printed
