"""optimum-cli, as users run it and in this process."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest


def optimum_cli(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the installed console script."""
    script = Path(sys.executable).with_name("optimum-cli")
    return subprocess.run(
        [str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=600,
    )


def optimum_cli_in_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The console script's main function in this process: the same but for ten seconds of imports.

    For commands that are refused. Those that write something run in a process of their own, as users run them.
    """
    from optimum.commands import optimum_cli as script

    command = ["optimum-cli", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    code: int | str | None = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", command)
        try:
            script.main()
        except SystemExit as stop:
            code = stop.code
    return subprocess.CompletedProcess(command, int(code or 0), out.getvalue(), err.getvalue())
