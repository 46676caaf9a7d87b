"""Fixtures: a real small model, real prose, and its exports. Everything is made once per session."""

import os
from pathlib import Path

import pytest
import torch
from command_line import optimum_cli
from demo_data import write_prose, write_smollm2


os.environ["HF_HUB_OFFLINE"] = "1"
# Triton reads this when it is first imported, which many a library does: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="session")
def tiny(workspace: Path) -> Path:
    """A random Llama of two layers: `hf` with a tokenizer of words, the IRs `dense` and `sparse`, and `text.txt`."""
    from optimum.intel import OVModelForCausalLM
    from tiny_models import word_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    from optimum_scap import sparsify_activations

    folder = workspace / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder / "hf")
    word_tokenizer(1000).save_pretrained(folder / "hf")
    (folder / "text.txt").write_text(" ".join(f"w{i * i % 997}" for i in range(20000)))
    exported = OVModelForCausalLM.from_pretrained(folder / "hf", export=True, compile=False)
    exported.save_pretrained(folder / "dense")
    ids = torch.arange(64)[None]
    sparsify_activations(exported, "0.5", [exported.prepare_inputs(ids, torch.ones_like(ids))])
    exported.save_pretrained(folder / "sparse")
    for name in ("dense", "sparse"):
        word_tokenizer(1000).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def smollm2(workspace: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder."""
    return write_smollm2(workspace / "smollm2")


@pytest.fixture(scope="session")
def texts(workspace: Path) -> tuple[Path, Path]:
    """(calibration prose, disjoint evaluation prose)."""
    return write_prose(workspace / "texts")


def _export(model: Path, output: Path, *flags: str) -> Path:
    result = optimum_cli("export", "openvino", "-m", model, "--task", "text-generation-with-past", *flags, output)
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="session")
def dense_int8(smollm2: Path, workspace: Path) -> Path:
    return _export(smollm2, workspace / "dense-int8", "--weight-format", "int8")


@pytest.fixture(scope="session")
def dense_int4(smollm2: Path, workspace: Path) -> Path:
    return _export(smollm2, workspace / "dense-int4", "--weight-format", "int4", "--group-size", "64")


@pytest.fixture(scope="session")
def sparse_int8(smollm2: Path, texts: tuple[Path, Path], workspace: Path) -> Path:
    """The main job: one command from the model to a sparse INT8 folder."""
    output = workspace / "sparse-int8"
    result = optimum_cli(
        *("export", "openvino", "-m", smollm2, "--weight-format", "int8"),
        *("--scap", "up=0.35,gate=0.35,down=0.55", "--scap-dataset", texts[0]),
        *("--scap-num-samples", "8", "--scap-seq-len", "128", output),
    )
    assert result.returncode == 0, result.stderr
    return output
