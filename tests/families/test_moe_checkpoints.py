"""Folders of mixtures of experts: the command line, its tables, and what is tuned."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from command_line import optimum_cli_in_process
from families import FAMILIES
from safetensors import safe_open
from tiny_models import VOCAB, word_tokenizer

from optimum_scap.evaluation.sparsity import realized_by_torch
from optimum_scap.torch.backend import pruned_layers
from optimum_scap.torch.checkpoint import kernel_shapes


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("thresholds", ["shared", "each"])
def test_a_folder_of_experts(thresholds: str, tmp_path: Path) -> None:
    FAMILIES["mixtral"].build().save_pretrained(tmp_path / "dense")
    word_tokenizer(VOCAB).save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(" ".join(f"w{index * index % 113}" for index in range(3000)))
    spec = ("--scap", "q=0.3,k=0.3,v=0.3,up=0.4,gate=0.4,down=0.5", "--scap-experts", thresholds)
    data = ("--scap-dataset", tmp_path / "text.txt", "--scap-num-samples", "6", "--scap-seq-len", "64")
    result = optimum_cli_in_process(
        "export", "torch", "-m", tmp_path / "dense", *spec, *data, "--device", "cpu", tmp_path / "sparse"
    )
    assert result.returncode == 0, result.stderr
    before, after = weights(tmp_path / "dense"), weights(tmp_path / "sparse")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    own = {path for path in pruned_layers(model) if ".experts." in path}
    assert len(own) == (2 * 3 if thresholds == "shared" else 2 * 4 * 3)
    found = realized_by_torch(model, [{"input_ids": torch.randint(3, VOCAB, (1, 64))}])
    assert own <= found.layers.keys() and {found.layers[path].group for path in own} == {"up", "gate", "down"}

    result = optimum_cli_in_process("scap", "info", tmp_path / "sparse")
    assert result.returncode == 0 and "experts" in result.stdout
    assert kernel_shapes(tmp_path / "sparse") == {torch.float32: {(48, (48, 24, 24))}}
