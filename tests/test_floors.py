"""The floors of the house: a module imports only what lies below it, the core no framework (docs/architecture.md).

Imports inside of functions count like any other: they are put there to be late, not to be hidden.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import optimum_scap


ROOT = Path(optimum_scap.__file__).parent
FRAMEWORKS = ("torch", "openvino", "nncf", "transformers", "datasets", "pyarrow", "optimum", "triton")

# From the ground up: a floor may import itself and what an earlier line holds.
FLOORS = (
    ("errors",),
    ("cache", "disk", "memory", "progress"),
    ("core",),
    ("data", "tasks", "checkpoint"),
    ("torch", "openvino"),
    ("vllm",),
    ("registration",),
    ("sparsify",),
    ("folders",),
    ("evaluation",),
    ("commands",),
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def modules() -> list[Path]:
    found = sorted(path for path in ROOT.rglob("*.py") if "register" not in path.relative_to(ROOT).parts)
    assert len(found) > 60
    return found


def imported_floors(source: str, folder: tuple[str, ...]) -> set[str]:
    """The floors of this package that the source of a module in `folder` imports anywhere in it."""
    package = ["optimum_scap", *folder]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*target, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        found |= {name[1] for name in names if name[0] == "optimum_scap" and len(name) > 1 and name[1] in LEVEL}
    return found


def floor_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_floor_imports_only_floors_below_it(path: Path) -> None:
    own = floor_of(path)
    if own == "__init__":  # the front of the package names what lies behind it, and the registration
        return
    imported = imported_floors(path.read_text(encoding="utf-8"), path.relative_to(ROOT).parts[:-1])
    forbidden = {other for other in imported if LEVEL[other] >= LEVEL[own] and other != own and own in LEVEL}
    assert not forbidden, f"{path.relative_to(ROOT)} imports {', '.join(sorted(forbidden))}"
    assert own in LEVEL, f"{own} has no floor: give it one in FLOORS"


def test_every_floor_exists() -> None:
    for name in LEVEL:
        assert (ROOT / name).is_dir() or (ROOT / f"{name}.py").is_file(), name


def test_a_wrong_import_is_found() -> None:
    """The check can fail."""
    source = "def late():\n    from ..torch import backend\n    import optimum_scap.commands.scap\n"
    source += "    from . import sites\n"
    assert imported_floors(source, ("core",)) == {"torch", "commands", "core"}
    assert imported_floors("from .linear import prune\nfrom ...errors import SCAPError", ("torch", "blocks")) == {
        "torch",
        "errors",
    }


def test_the_core_imports_no_framework() -> None:
    names = [
        ".".join(("optimum_scap", *path.relative_to(ROOT).with_suffix("").parts))
        for path in modules()
        if LEVEL.get(floor_of(path), 99) < LEVEL["torch"]
    ]
    script = (
        "import sys, importlib\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"print([name for name in {FRAMEWORKS} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_importing_the_backends_imports_no_command_line() -> None:
    script = (
        "import sys, optimum_scap.torch.backend, optimum_scap.openvino.modeling, optimum_scap.folders\n"
        "print([name for name in sys.modules if name.startswith('optimum_scap.commands')])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
