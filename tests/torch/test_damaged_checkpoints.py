"""Sparse checkpoints with damage of every kind: they load, or one clean error says what is wrong."""

import json
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import transformers as tf
from tiny_models import tiny_model, tiny_samples

import optimum_scap
from optimum_scap import SCAPError, SCAPParameters, sparsify_activations
from optimum_scap.checkpoint import check_checkpoint
from optimum_scap.folders import export_checkpoint
from optimum_scap.torch.backend import read_parameters
from optimum_scap.torch.checkpoint import is_torch_folder, kernel_shapes, read_folder_parameters


OURS = Path(optimum_scap.__file__).parent
# Large counts would only tell how long transformers takes to build a large model.
WRONG_VALUES = (None, -1, 0, 3, 1.5, True, "x", "", "scap", [], [1], {}, {"x": 1}, float("nan"), 1e300, "\ud800")


@pytest.fixture(scope="module")
def parameters() -> SCAPParameters:
    return read_parameters(sparsify_activations(tiny_model("llama"), "0.4", tiny_samples("llama")))


@pytest.fixture(scope="module")
def checkpoint(parameters: SCAPParameters, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    model = sparsify_activations(tiny_model("llama"), parameters)
    model.save_pretrained(folder / "one file")
    model.save_pretrained(folder / "shards", max_shard_size="60KB")
    return folder


def damage_bytes(path: Path, random: Random, end: int | None = None) -> None:
    """Some bytes of the first `end` are changed, lost, or more."""
    content = bytearray(path.read_bytes())
    for _ in range(random.randint(1, 3)):
        at = random.randrange(end or len(content))
        what = random.randrange(3)
        if what == 0:
            content[at] = random.randrange(256)
        elif what == 1:
            del content[at : at + random.randint(1, 20)]
        else:
            content[at:at] = random.randbytes(random.randint(1, 20))
    path.write_bytes(content)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def damage_values(path: Path, random: Random) -> None:
    content = json.loads(path.read_text())
    container, key = random.choice(list(places(content)))
    if random.random() < 0.2:
        del container[key]
    else:
        container[key] = random.choice(WRONG_VALUES)
    path.write_text(json.dumps(content))


def truncate(path: Path, random: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: random.choice([0, 7, 8, random.randrange(len(content)), len(content) - 1])])


def damage_header(path: Path, random: Random) -> None:
    damage_bytes(path, random, 8 + int.from_bytes(path.read_bytes()[:8], "little"))


def damage_index(path: Path, random: Random) -> None:
    what = random.randrange(4)
    if what == 0:
        damage_bytes(path, random)
    elif what == 1:
        damage_values(path, random)
    elif what == 2:
        random.choice(sorted(path.parent.glob("*-of-*.safetensors"))).unlink()
    else:
        shards = sorted(path.parent.glob("*-of-*.safetensors"))
        shutil.copyfile(*random.sample(shards, 2))


KINDS: dict[str, tuple[str, Callable[[Path, Random], None]]] = {
    "bytes of config.json": ("one file/config.json", damage_bytes),
    "values of config.json": ("one file/config.json", damage_values),
    "header": ("one file/model.safetensors", damage_header),
    "truncated weights": ("one file/model.safetensors", truncate),
    "index": ("shards/model.safetensors.index.json", damage_index),
}


def check_command(what: str, run: Callable[[], Any]) -> None:
    """What the command line does on a folder ends well or in one line."""
    try:
        run()
    except SCAPError as error:
        assert str(error) and "\n" not in str(error), f"{what}: {error}"
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def check_loading(what: str, folder: Path) -> None:
    """transformers raises what it likes; what comes out of our code is a SCAPError."""
    try:
        tf.AutoModelForCausalLM.from_pretrained(folder)
    except SCAPError as error:
        assert str(error) and "\n" not in str(error), f"{what}: {error}"
    except Exception as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if OURS in Path(frame.filename).parents]
        assert not ours, f"{what}: {type(error).__name__}: {error} in {raised_in} by way of {ours[-1]}"


def check_damage(kind: str, numbers: range, checkpoint: Path, parameters: SCAPParameters, tmp_path: Path) -> None:
    file, damage = KINDS[kind]
    refused = 0
    for number in numbers:
        folder, output = tmp_path / f"{number}", tmp_path / f"{number} out"
        shutil.copytree(checkpoint / file.split("/")[0], folder)
        output.mkdir()
        what = f"{kind}, number {number}"
        damage(folder / file.split("/")[1], Random(what))
        check_loading(what, folder)
        if is_torch_folder(folder):
            check_command(f"{what}, info", lambda folder=folder: read_folder_parameters(folder))
            check_command(f"{what}, tune", lambda folder=folder: kernel_shapes(folder))
        check_command(f"{what}, export openvino", lambda folder=folder: check_checkpoint(folder))
        try:
            check_command(
                f"{what}, export torch",
                lambda folder=folder, output=output: export_checkpoint(str(folder), output, parameters, device="cpu"),
            )
        finally:
            refused += not list(output.iterdir())
            shutil.rmtree(folder)
            shutil.rmtree(output)
    assert refused > 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", KINDS)
def test_damage(kind: str, checkpoint: Path, parameters: SCAPParameters, tmp_path: Path) -> None:
    check_damage(kind, range(10), checkpoint, parameters, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
def test_much_damage(kind: str, checkpoint: Path, parameters: SCAPParameters, tmp_path: Path) -> None:
    check_damage(kind, range(10, 110), checkpoint, parameters, tmp_path)
