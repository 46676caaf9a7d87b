"""What calibration found is written beside the output that the user named."""

from argparse import Namespace
from pathlib import Path

import pytest

from optimum_scap import SCAPConfig, load_parameters
from optimum_scap.commands.kept import parameters_kept
from optimum_scap.core.parameters import LayerParameters, SCAPParameters


def parameters() -> SCAPParameters:
    layer = LayerParameters(role="up", estimator="zero", target_sparsity=0.5, mode=0.0, threshold=0.25)
    return SCAPParameters(version="0", config=SCAPConfig.from_spec("0.5"), layers={"mlp.up_proj": layer})


def test_a_command_that_moves_its_output_while_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the export does, which writes to a folder that is gone when it has failed."""
    args = Namespace(output=str(tmp_path / "out"))
    with pytest.raises(RuntimeError), parameters_kept(args, SCAPConfig.from_spec("0.5")) as keep:
        args.output = tmp_path / ".out.scap-1" / "complete"
        keep(parameters())
        raise RuntimeError("the export failed")
    file = tmp_path / "out.scap-parameters.json"
    assert load_parameters(file) == parameters() and str(file) in capsys.readouterr().err


def test_nothing_is_written_when_all_went_well_or_nothing_was_found(tmp_path: Path) -> None:
    args = Namespace(output=tmp_path / "out")
    with parameters_kept(args, SCAPConfig.from_spec("0.5")) as keep:
        keep(parameters())
    with pytest.raises(RuntimeError), parameters_kept(args, SCAPConfig.from_spec("0.5")):
        raise RuntimeError("before anything was found")
    assert not list(tmp_path.iterdir())
