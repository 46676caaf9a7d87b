"""What keeps a model from being saved is said before the calibration; what comes up after it loses nothing."""

import errno
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import SafetensorError
from tiny_models import CONFIGS, tiny_model, tiny_samples
from torch import nn

from optimum_scap import SCAPConfig, SCAPError, SCAPParameters, sparsify_activations
from optimum_scap.folders import export_checkpoint
from optimum_scap.torch import saving
from optimum_scap.torch.backend import pruned_layers, read_parameters


@pytest.fixture(scope="module")
def parameters() -> SCAPParameters:
    model = sparsify_activations(tiny_model("llama"), "0.4", tiny_samples("llama"))
    return read_parameters(model)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "output").mkdir()
    return tmp_path / "output"


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Samples of `export_checkpoint`, which takes text otherwise; what was asked for is noted."""
    asked: list[Any] = []

    def samples(model: nn.Module, *_: Any) -> list[Any]:
        asked.append(model)
        return tiny_samples("llama")

    monkeypatch.setattr("optimum_scap.torch.dataset.build_samples", samples)
    return asked


def unsaveable(model: Any, what: str) -> None:
    if what == "temperature":
        model.generation_config.temperature = 0.6
    elif what == "beams":
        model.generation_config.early_stopping = True
    elif what == "several":
        model.generation_config.update(temperature=0.6, top_p=0.9)
    elif what == "object in config":
        model.config.extra = object()
    elif what == "generation in config":
        model.config.temperature = 0.6
    else:
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("temperature", r"generation_config is invalid: `temperature`: .*set `do_sample=True` or unset `temperature`"),
        ("beams", r"generation_config is invalid: `early_stopping`: .*unset `early_stopping`"),
        ("several", r"`temperature`: .* `top_p`: "),
        ("object in config", "object is not JSON serializable"),
        ("generation in config", "config holds temperature, which belong into generation_config"),
        ("tied weights", "shared tensors.*mlp.up_proj.weight"),
    ],
)
def test_models_that_could_not_be_saved(what: str, message: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    unsaveable(model, what)
    with pytest.raises((ValueError, TypeError, RuntimeError)):  # what transformers says
        model.save_pretrained(tmp_path)
    with pytest.raises(SCAPError, match=message) as found:
        sparsify_activations(model, "0.4", tiny_samples("llama"))
    assert "\n" not in str(found.value) and not pruned_layers(model)


def test_models_of_other_libraries_save_themselves() -> None:
    """diffusers' and huggingface_hub's have a save_pretrained too, and a config that is a dict."""

    class Model(nn.Sequential):
        config = types.MappingProxyType({"up_proj": 16})

        def save_pretrained(self, folder: Path) -> None: ...

    model = Model()
    model.up_proj = nn.Linear(16, 16)
    sparsify_activations(model, "0.4", [torch.randn(64, 16)])
    assert pruned_layers(model).keys() == read_parameters(model).layers.keys() == {"up_proj"}


def test_parameters_are_applied_to_any_model(parameters: SCAPParameters) -> None:
    model = tiny_model("llama")
    unsaveable(model, "temperature")
    assert pruned_layers(sparsify_activations(model, parameters)).keys() == parameters.layers.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_healthy_models_can_be_saved(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    before = model.config.to_json_string()
    saving.check_can_be_saved(model)
    assert model.config.to_json_string() == before
    model.save_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size * 0.8 <= saving.bytes_to_save(model) <= size


def test_a_generation_config_that_cannot_be_saved_is_carried_over(
    checkpoint: Path, output: Path, calibrated: list[Any]
) -> None:
    brought = '{"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 5],\n "pad_token_id": 0}'
    (checkpoint / "generation_config.json").write_text(brought)
    export_checkpoint(str(checkpoint), output, SCAPConfig.from_spec("0.4"), device="cpu")
    assert (output / "generation_config.json").read_text() == brought
    assert calibrated[0].generation_config.eos_token_id == [2, 5]
    model = tf.AutoModelForCausalLM.from_pretrained(output)
    assert len(pruned_layers(model)) == 6 and model.generation_config.temperature == 0.6


def test_while_it_is_saved_only_the_fields_that_keep_it_from_that_are_changed() -> None:
    model = tiny_model("llama")
    own = model.generation_config
    own.update(temperature=0.6, top_k=7, eos_token_id=[2, 5], max_new_tokens=9)
    with saving.valid_generation_config(model) as changed:
        assert changed and model.generation_config.eos_token_id == [2, 5]
        assert model.generation_config.max_new_tokens == 9 and model.generation_config.temperature in (None, 1.0)
        model.generation_config.validate(strict=True)
    assert model.generation_config is own and own.temperature == 0.6
    own.update(temperature=None, top_k=None)
    with saving.valid_generation_config(model) as changed:
        assert not changed and model.generation_config is own
    own.max_new_tokens = -1  # which names no field
    with saving.valid_generation_config(model) as changed:
        assert changed
        model.generation_config.validate(strict=True)


def test_parameters_are_handed_out_before_anything_is_written(
    checkpoint: Path, output: Path, calibrated: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[SCAPParameters] = []

    def keep(found: SCAPParameters) -> None:
        assert not list(output.iterdir())
        kept.append(found)

    def fail(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tf.LlamaForCausalLM, "save_pretrained", fail)
    with pytest.raises(SCAPError, match=rf"^no space left on {output} \(\d+ MiB free\)$"):
        export_checkpoint(str(checkpoint), output, SCAPConfig.from_spec("0.4"), device="cpu", on_calibrated=keep)
    assert len(kept) == 1 and len(kept[0].layers) == 6
    with pytest.raises(SCAPError, match="no space left"):
        export_checkpoint(str(checkpoint), output, kept[0], device="cpu", on_calibrated=keep)
    assert len(kept) == 1  # nothing was calibrated


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"^no space left on \S+ \(\d+ MiB free\)$"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), r"^no space left on \S+ \(\d+ MiB free\)$"),
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), r"^no space left on \S+ \(\d+ MiB free\)$"),
        (SafetensorError("InvalidTensorView\nline 2"), r"^the model could not be written to \S+: "),
        (PermissionError(errno.EACCES, "Permission denied"), r"^the model could not be written to \S+: .*denied"),
        (RuntimeError("of a model's own code"), r"^the model could not be written to \S+: of a model's own code$"),
    ],
)
def test_errors_while_writing(error: Exception, message: str, tmp_path: Path) -> None:
    with pytest.raises(SCAPError, match=message) as found, saving.saving_to(tmp_path):
        raise error
    assert found.value.__cause__ is error and "\n" not in str(found.value)


def test_a_disk_that_is_too_small_is_found_before_the_calibration(
    checkpoint: Path, output: Path, calibrated: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(output)._replace(free=2**16)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SCAPError, match=rf"^no space left on {output} \(0 MiB free, 0 MiB needed\)$"):
        export_checkpoint(str(checkpoint), output, SCAPConfig.from_spec("0.4"), device="cpu")
    assert not calibrated
    with pytest.raises(SCAPError, match="does not exist or cannot be written to"):
        export_checkpoint(str(checkpoint), output / "missing", SCAPConfig.from_spec("0.4"), device="cpu")
    assert not calibrated


def test_weights_count_once_however_many_layers_share_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert saving.bytes_to_save(model) == 2 * 4 * 4 * 4
    model[1].weight = model[0].weight
    assert saving.bytes_to_save(model.half()) == 4 * 4 * 2
