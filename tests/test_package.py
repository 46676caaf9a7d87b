"""The package as a whole: light to import, and its place in optimum-cli."""

import subprocess
import sys
import time
from argparse import ArgumentParser
from types import SimpleNamespace

from command_line import optimum_cli
from optimum.commands.export.openvino import OVExportCommand, parse_args_openvino

import optimum_scap
from optimum_scap.commands.export_openvino import extend_openvino_export


def test_importing_is_light() -> None:
    script = (
        "import sys, optimum_scap; print([m for m in ('torch', 'openvino', 'nncf', 'optimum') if m in sys.modules])"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
    assert time.monotonic() - started < 0.5 + startup_seconds()


def startup_seconds() -> float:
    """What the interpreter itself needs here and now."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", ""])
    return time.monotonic() - started


def test_every_public_name_resolves() -> None:
    for name in optimum_scap.__all__:
        assert getattr(optimum_scap, name) is not None
    assert set(optimum_scap.__all__) <= set(dir(optimum_scap))


def test_help_has_the_flags_under_their_own_heading() -> None:
    result = optimum_cli("export", "openvino", "--help")
    assert result.returncode == 0
    _, _, ours = result.stdout.partition("SCAP (activation sparsity):")
    for flag in ("mode", "dataset", "num-samples", "seq-len", "exclude", "fused"):
        assert f"--scap-{flag}" in ours
    assert "--weight-format" in result.stdout and "--weight-format" not in ours


def test_without_scap_the_export_is_optimum_intels_own(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(OVExportCommand, "parse_args", staticmethod(parse_args_openvino))
    monkeypatch.setattr(OVExportCommand, "run", lambda command: seen.append(vars(command.args).copy()))
    monkeypatch.setattr(OVExportCommand, "_knows_scap", False, raising=False)
    extend_openvino_export()
    extended, stock = ArgumentParser(), ArgumentParser()
    OVExportCommand.parse_args(extended)
    parse_args_openvino(stock)
    arguments = ["-m", "model", "--weight-format", "int4", "--group-size", "64", "out"]
    command = SimpleNamespace(args=extended.parse_args(arguments))
    OVExportCommand.run(command)
    assert len(seen) == 1
    assert vars(stock.parse_args(arguments)).items() <= seen[0].items()


def test_extending_twice_adds_the_flags_once() -> None:
    extend_openvino_export()
    extend_openvino_export()
    parser = ArgumentParser()
    OVExportCommand.parse_args(parser)
    assert parser.parse_args(["-m", "m", "--scap", "0.5", "out"]).scap == "0.5"
