"""A sparse model goes wherever the dense one does: safetensors, FSDP, DDP, distributed checkpoints."""

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers as tf
from safetensors.torch import load_file, load_model, save_file, save_model
from tiny_models import tiny_model, tiny_samples
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from optimum_scap import SCAPConfig, sparsify_activations
from optimum_scap.torch import linear as layers
from optimum_scap.torch.backend import pruned_layers, read_parameters


@pytest.fixture(params=["on a CPU", "in the order of the kernels"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "on a CPU":
        monkeypatch.setattr(layers, "wants_input_major", lambda weight: True)
    return request.param


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sparse_model(name: str = "llama") -> tuple[Any, dict[str, torch.Tensor]]:
    model, samples = tiny_model(name), tiny_samples(name)
    sparsify_activations(model, SCAPConfig.from_spec("0.4", mode="down=median"), samples)
    return model, samples[0]


def logits_of(model: Any, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**sample).logits, model(input_ids=sample["input_ids"][:, :1]).logits], dim=1)


def another(model: Any) -> Any:
    """The same sparse model with other weights."""
    other = tiny_model("llama", seed=1)
    sparsify_activations(other, read_parameters(model))
    return other


def test_safetensors(order: str, tmp_path: Path) -> None:
    model, sample = sparse_model()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = another(model)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits_of(other, sample), logits_of(model, sample))
    save_model(model, str(tmp_path / "whole.safetensors"))
    other = another(model)
    load_model(other, tmp_path / "whole.safetensors")
    assert torch.equal(logits_of(other, sample), logits_of(model, sample))


def test_torch_save(order: str) -> None:
    model, sample = sparse_model()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = another(model)
    other.load_state_dict(torch.load(file))
    assert torch.equal(logits_of(other, sample), logits_of(model, sample))


@pytest.mark.usefixtures("alone")
def test_distributed_checkpoints(order: str, tmp_path: Path) -> None:
    model, sample = sparse_model()
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=tmp_path)
    other = another(model)
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_model_state_dict(other, state["model"])
    assert torch.equal(logits_of(other, sample), logits_of(model, sample))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("trained", [False, True])
def test_fsdp(trained: bool) -> None:
    model, sample = sparse_model()
    expected = logits_of(model, sample)
    for block in model.model.layers:
        fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert type(pruned_layers(model)["model.layers.0.mlp.up_proj"].weight).__name__ == "DTensor"
    torch.testing.assert_close(logits_of(model.eval(), sample), expected, atol=1e-5, rtol=1e-4)
    if trained:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        model.train()(**sample, labels=sample["input_ids"]).loss.backward()
        optimizer.step()
    whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
    other = another(model)
    other.load_state_dict(whole)
    torch.testing.assert_close(logits_of(other, sample), logits_of(model.eval(), sample), atol=1e-5, rtol=1e-4)
    assert torch.allclose(logits_of(other, sample), expected, atol=1e-4) != trained


@pytest.mark.usefixtures("alone")
def test_models_on_a_gpu_are_sharded_by_way_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(layers, "wants_input_major", lambda weight: True)
        model, sample = sparse_model()
        expected = logits_of(model, sample)
        with pytest.raises(NotImplementedError, match="non-contiguous"):
            fully_shard(copy.deepcopy(model), mesh=init_device_mesh("cpu", (1,)))
    fully_shard(model.cpu(), mesh=init_device_mesh("cpu", (1,)))
    torch.testing.assert_close(logits_of(model, sample), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("alone")
def test_data_parallel(order: str) -> None:
    model, sample = sparse_model()
    expected = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for each in (wrapped, expected):
        each.train()(**sample, labels=sample["input_ids"]).loss.backward()
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)
    assert read_parameters(wrapped) is read_parameters(model)


def test_accelerate(order: str) -> None:
    from accelerate import Accelerator

    model, sample = sparse_model()
    expected = logits_of(model, sample)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    assert torch.equal(logits_of(prepared, sample), expected)
    state = accelerator.get_state_dict(prepared)
    assert all(value.is_contiguous() for value in state.values())


def test_weights_that_others_gather_are_what_is_saved(order: str, tmp_path: Path) -> None:
    """FSDP and DeepSpeed hand save_pretrained the weights that they gathered from all processes."""
    model, sample = sparse_model()
    model.save_pretrained(tmp_path / "first")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    other = another(model)
    for number, each in enumerate((model, loaded)):
        each.save_pretrained(tmp_path / str(number), state_dict=other.state_dict())
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert torch.equal(logits_of(again, sample), logits_of(other, sample))
