"""Who is compared when a PyTorch checkpoint is measured, which is known without a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_scap import SCAPConfig, sparsify_activations
from optimum_scap.evaluation.speed import Contestant
from optimum_scap.evaluation.torch_speed import load, torch_contestants
from optimum_scap.torch.blocks import has_replaced_dense_layers


EVERY_ROLE = "q=0.5,k=0.5,v=0.5,o=0.5,up=0.5,gate=0.5,down=0.5"


def checkpoint(folder: Path, spec: str, **options: Any) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    sparsify_activations(model, SCAPConfig.from_spec(spec, **options), [{"input_ids": torch.arange(32)[None]}])
    model.save_pretrained(folder)
    return folder


def test_dense_layers_that_stay_stock_are_a_column_of_their_own(tmp_path: Path) -> None:
    sparse = checkpoint(tmp_path / "sparse", "0.5")
    assert torch_contestants(sparse, gpu=True) == {
        "dense": Contestant(sparse, fast=False),
        "SCAP, dense layers stock": Contestant(sparse, fast=True, dense_layers="stock"),
        "SCAP": Contestant(sparse, fast=True),
    }
    # the order of the columns
    assert list(torch_contestants(sparse, tmp_path, gpu=True)) == ["dense", "SCAP, dense layers stock", "SCAP"]
    assert torch_contestants(sparse, tmp_path, gpu=True)["dense"] == Contestant(tmp_path, fast=False)


@pytest.mark.parametrize(
    ("spec", "options", "gpu"),
    [
        ("0.5", {}, False),  # no kernels there
        ("0.5", {"dense_layers": "stock"}, True),  # SCAP is that column
        ("0.5", {"exclude": [r"self_attn\."]}, True),  # excluded layers are left alone
        (EVERY_ROLE, {}, True),  # none is dense
    ],
)
def test_there_is_no_second_column_of_the_same(tmp_path: Path, spec: str, options: dict[str, Any], gpu: bool) -> None:
    assert list(torch_contestants(checkpoint(tmp_path, spec, **options), gpu=gpu)) == ["dense", "SCAP"]


def test_dense_layers_are_loaded_as_asked(tmp_path: Path) -> None:
    folder, device = checkpoint(tmp_path, "0.5"), torch.device("cpu")
    assert has_replaced_dense_layers(load(folder, True, device))
    stock = load(folder, True, device, dense_layers="stock")
    assert not has_replaced_dense_layers(stock) and type(stock.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    dense = load(folder, False, device, dense_layers="stock")  # which has nothing to say about that
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear
