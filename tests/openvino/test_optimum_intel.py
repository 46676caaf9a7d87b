"""Warnings of optimum-intel about what users cannot change."""

import logging
from pathlib import Path

import pytest

from optimum_scap.openvino.optimum_intel import quiet_offline_guess


@pytest.mark.parametrize("kind", [str, Path])
def test_loading_a_local_folder_offline_warns_of_nothing(
    kind: type, tiny: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimum.intel import OVModelForCausalLM

    # optimum-intel's loggers do not hand records on to the root's handlers, where caplog listens.
    library = logging.getLogger("optimum.intel.openvino.modeling_base")
    monkeypatch.setattr(library, "handlers", [caplog.handler])
    quiet_offline_guess()
    OVModelForCausalLM.from_pretrained(kind(tiny / "dense"), compile=False)
    assert "Could not infer" not in caplog.text
    library.warning("Could not infer whether the model was already converted or not: the disk is on fire")
    assert "on fire" in caplog.text  # another reason is no noise
