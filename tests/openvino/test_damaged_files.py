"""Damaged fused IRs load and run, or raise: they never end the process, nor hang. A damaged cache is built again."""

import json
import subprocess
import sys
from pathlib import Path

import openvino as ov
import pytest
from damage import Damage, changed_digits, damage_file, flipped, overwritten, swapped_attributes, truncated
from synthetic import compressed, gated_ffn, samples

from optimum_scap import sparsify_activations
from optimum_scap.openvino.extension import build
from optimum_scap.openvino.extension.build import build_extension
from optimum_scap.openvino.fuse import fuse


RUN = """
import json, sys
from pathlib import Path
import numpy as np, openvino as ov
from optimum_scap import SCAPError
from optimum_scap.openvino.files import read_model
library, hidden, *models = json.loads(sys.stdin.read())
core = ov.Core()
for model in models:
    print(model, end=" ", flush=True)
    try:
        compiled = core.compile_model(read_model(Path(model), Path(library)), "CPU", {"INFERENCE_NUM_THREADS": 1})
        for tokens in (1, 3, 40):
            compiled(np.ones((1, tokens, hidden), np.float32))
    except (RuntimeError, SCAPError) as error:
        print("raised", " ".join(str(error).split()) or "nothing", flush=True)
    else:
        print("ran", flush=True)
"""
IRS = {
    "ffn-int4": ("int4_asym", "up=0.4,gate=0.4,down=0.6"),
    "linear-int8": ("int8_asym", "up=0.4,gate=0.4"),
    "ffn-f32": ("f32", "up=0.4,gate=0.4,down=0.6"),
}


@pytest.fixture(scope="module")
def fused_irs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused")
    for name, (weights, spec) in IRS.items():
        model = sparsify_activations(compressed(gated_ffn(blocks=1, bias=True), weights), spec, samples())
        fuse(model, precision="f32")
        ov.save_model(model, folder / f"{name}.xml", compress_to_fp16=False)
    return folder


def outcomes(models: list[Path]) -> dict[str, str]:
    """What a process of its own says of each."""
    arguments = [str(build_extension()), samples()[0]["x"].shape[-1], *map(str, models)]
    run = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(arguments), capture_output=True, text=True, timeout=600
    )
    lines = run.stdout.splitlines()
    assert run.returncode == 0, f"exit status {run.returncode} at {lines[-1:]}: {run.stderr[-2000:]}"
    assert len(lines) == len(models)
    return dict(line.split(" ", 1) for line in lines)


KINDS: list[tuple[str, Damage]] = [
    (".xml", truncated),
    (".xml", flipped),
    (".xml", overwritten),
    (".xml", swapped_attributes),
    (".xml", changed_digits),
    (".bin", truncated),
    (".bin", flipped),
    (".bin", overwritten),
]


@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("suffix", "damage"), KINDS, ids=lambda value: getattr(value, "__name__", value))
def test_a_damaged_ir_runs_or_raises(suffix: str, damage: Damage, count: int, fused_irs: Path, tmp_path: Path) -> None:
    models = []
    for seed in range(count):
        name = list(IRS)[seed % len(IRS)]
        for part in (".xml", ".bin"):
            (tmp_path / f"{seed}{part}").write_bytes((fused_irs / f"{name}{part}").read_bytes())
        damage_file(tmp_path / f"{seed}{suffix}", damage, seed)
        models.append(tmp_path / f"{seed}.xml")
    found = outcomes([*(fused_irs / f"{name}.xml" for name in IRS), *models])
    assert all(found[str(fused_irs / f"{name}.xml")] == "ran" for name in IRS)
    assert all(found[str(model)] == "ran" or found[str(model)].startswith("raised ") for model in models)
    if damage is truncated:
        assert all(found[str(model)].startswith("raised ") for model in models)


@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", [truncated, flipped, overwritten], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("suffix", ["", ".sha256"], ids=["library", "digest"])
def test_a_damaged_cache_is_built_again(
    suffix: str, damage: Damage, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * 32

    def compiler(command: list[str], seconds: float, **environment: str) -> tuple[int, str, str]:
        if "-o" in command:
            Path(command[-1]).write_bytes(content)
        return 0, "compiler 1.0", ""

    monkeypatch.setattr(build, "_run", compiler)
    library = build_extension(cache_dir=tmp_path)
    for seed in range(count):
        damage_file(library.with_name(library.name + suffix), damage, seed)
        assert build_extension(cache_dir=tmp_path) == library
        assert library.read_bytes() == content
