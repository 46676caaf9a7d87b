"""Names are printed as they are, whatever rich would read into them."""

from pathlib import Path

import pytest

from optimum_scap import SCAPConfig, SCAPParameters
from optimum_scap.commands.tables import print_benchmark, print_parameters
from optimum_scap.core.parameters import LayerParameters
from optimum_scap.evaluation.speed import Measurement, Spread


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


@pytest.mark.parametrize("name", NAMES)
def test_benchmark(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    speed = Spread(1.0, 0.5, 2.0)
    print_benchmark([Measurement(each, "m", {8: speed}, speed, 1.0, 1.0) for each in ("dense", name)], {"up": 0.5})
    printed = capsys.readouterr().out
    assert name in printed and "1 [0.5, 2]" in printed and "skipped: up 50.0%" in printed
