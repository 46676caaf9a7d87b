"""Where the extension and the tuned configurations are kept."""

import os
import sys
from pathlib import Path

import pytest

from optimum_scap import SCAPError
from optimum_scap.cache import cache_folder
from optimum_scap.torch.kernels.configurations import cache_file


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPTIMUM_SCAP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def test_a_relative_folder_counts_from_here_and_tilde_is_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for named, folder in (("mine", "mine"), ("../mine", "../mine"), ("~/mine", "home/mine"), ("~", "home")):
        monkeypatch.setenv("OPTIMUM_SCAP_CACHE", named)
        assert cache_folder() == Path(os.path.normpath(tmp_path / folder))


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the XDG specification is for other systems")
def test_a_relative_xdg_cache_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == tmp_path / "home/.cache/optimum_scap"
    for named in ("", "cache", "./cache", "~/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert cache_folder() == tmp_path / "home/.cache/optimum_scap"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/optimum_scap"


def test_tuned_configurations_lie_in_the_same_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform in ("linux", "darwin"):
        monkeypatch.setattr(sys, "platform", platform)
        assert cache_file().parent == cache_folder()


@pytest.mark.parametrize("named", ["", "~nobody-of-this-name/cache"])
def test_without_a_home_the_error_says_what_to_set(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setenv("OPTIMUM_SCAP_CACHE", named)
    with pytest.raises(SCAPError, match=r"no folder for the cache .*: set OPTIMUM_SCAP_CACHE to an absolute path"):
        cache_folder()


def test_a_current_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("OPTIMUM_SCAP_CACHE", "mine")
    with pytest.raises(SCAPError, match="no folder for the cache"):
        cache_folder()
