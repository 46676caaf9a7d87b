"""Quantized checkpoints that cannot be read as they should: one line that names the tensor, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import optimum_cli_in_process
from quantized_checkpoints import (
    add_tokenizer,
    float_model,
    tensors_of,
    write_awq,
    write_compressed_tensors,
    write_gptq,
)
from safetensors.torch import save_file

from optimum_scap import SCAPError, sparsify_activations
from optimum_scap.torch.quantize import quantize_weights


UP = "model.layers.1.mlp.up_proj"
WRITERS: dict[str, Callable[[Path], Any]] = {
    "compressed-tensors": lambda folder: write_compressed_tensors(folder, 4, False, 32, "pack-quantized"),
    "GPTQ": write_gptq,
    "AWQ": write_awq,
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            WRITERS[name](made[name])
            add_tokenizer(made[name])
            (made[name] / "text.txt").write_text(" ".join(f"w{i * i % 97}" for i in range(3000)))
        return made[name]

    return get


def damaged(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> Path:
    """A copy of a checkpoint with other tensors, or with other fields in its `quantization_config`."""
    tensors = tensors_of(source)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((source / "config.json").read_text())
    fields["quantization_config"].update(config)
    (folder / "config.json").write_text(json.dumps(fields))
    for name in ("tokenizer.json", "tokenizer_config.json", "text.txt"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def export(folder: Path, *flags: Any) -> tuple[Any, Path]:
    output = folder / "out"
    sizes = ("--scap", "0.5", "--scap-dataset", folder / "text.txt", "--scap-num-samples", "2", "--scap-seq-len", "16")
    return optimum_cli_in_process("export", "torch", "-m", folder, *sizes, *flags, output), output


def assert_refused(folder: Path, message: str, *flags: Any) -> None:
    result, output = export(folder, *flags)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and message in errors[0], result.stderr
    assert not output.exists()


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def changed(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, how(tensors[name]).contiguous())


CASES: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "no scales": ("GPTQ", without(f"{UP}.scales"), {}, f"{UP}.scales is missing"),
    "no marker": (
        "compressed-tensors",
        without(f"{UP}.weight_scale"),
        {},
        f"layer {UP}: its weights are incomplete, there is {UP}.weight_packed",
    ),
    "no tensors": (
        "AWQ",
        lambda tensors: [tensors.pop(f"{UP}.{name}") for name in ("qweight", "qzeros", "scales")],
        {},
        f"layer {UP}: the checkpoint has no weights for it",
    ),
    "no zero points": ("AWQ", without(f"{UP}.qzeros"), {}, f"{UP}.qzeros is missing"),
    "a wrong shape": (
        "AWQ",
        changed(f"{UP}.qweight", lambda tensor: tensor[:-1]),
        {},
        f"{UP}.qweight has the shape [63, 16]; for 64 input and 128 output channels it would be [64, 16]",
    ),
    "another shape": (
        "compressed-tensors",
        changed(f"{UP}.weight_packed", lambda tensor: tensor[:, :-1]),
        {},
        f"{UP}.weight_packed has the shape [128, 7]",
    ),
    "a wrong type": (
        "GPTQ",
        changed(f"{UP}.qweight", lambda tensor: tensor.float()),
        {},
        f"{UP}.qweight is of type float32, not int32",
    ),
    "scales of integers": (
        "compressed-tensors",
        changed(f"{UP}.weight_scale", lambda tensor: tensor.int()),
        {},
        f"{UP}.weight_scale is of type int32, not float16 or bfloat16 or float32",
    ),
    "groups that do not divide": (
        "compressed-tensors",
        changed(f"{UP}.weight_scale", lambda tensor: torch.ones(128, 3)),
        {},
        f"{UP}.weight_scale has 3 groups, which 64 input channels cannot form",
    ),
    "a shape that is not the layer's": (
        "compressed-tensors",
        changed(f"{UP}.weight_shape", lambda tensor: tensor + 1),
        {},
        f"layer {UP}: weight_shape says [129, 65]",
    ),
    "act-order": (
        "GPTQ",
        changed(f"{UP}.g_idx", lambda tensor: tensor.flip(0)),
        {"desc_act": True},
        f"layer {UP}: g_idx does not count up",
    ),
    "act-order of compressed-tensors": (
        "compressed-tensors",
        lambda tensors: tensors.update({f"{UP}.weight_g_idx": torch.zeros(64, dtype=torch.int32)}),
        {},
        f"{UP}.weight_g_idx: weights ordered by activations are not supported",
    ),
    "act-order without an order": (
        "GPTQ",
        without(f"{UP}.g_idx"),
        {"desc_act": True},
        f"{UP}.g_idx is missing, and desc_act says that the order of channels matters",
    ),
    "zero points of symmetric weights": (
        "GPTQ",
        lambda tensors: None,
        {"sym": True},
        "qzeros has other zero points than 8, though the config says sym",
    ),
    "unknown tensors": (
        "AWQ",
        lambda tensors: tensors.update({f"{UP}.rotation": torch.zeros(2)}),
        {},
        f"{UP}.rotation is a tensor that layers of this kind are not known to have",
    ),
    "a number of bits": ("GPTQ", lambda tensors: None, {"bits": 3}, "GPTQ checkpoints of 3 bits are not read"),
    "no number of bits": ("GPTQ", lambda tensors: None, {"bits": None}, "GPTQ checkpoints of None bits are not read"),
    "another group size": (
        "GPTQ",
        lambda tensors: None,
        {"group_size": 48},
        "the group size 48 does not divide its 128 input channels",
    ),
    "another layout": ("AWQ", lambda tensors: None, {"version": "gemv"}, "AWQ checkpoints of version gemv are not"),
    "another format": (
        "compressed-tensors",
        lambda tensors: None,
        {"format": "float-quantized"},
        "compressed-tensors checkpoints of format float-quantized are not read",
    ),
    "a kv cache": (
        "compressed-tensors",
        lambda tensors: None,
        {"kv_cache_scheme": {"num_bits": 8}},
        "kv_cache_scheme: quantized activations are not supported",
    ),
    "config groups of another type": (
        "compressed-tensors",
        lambda tensors: None,
        {"config_groups": []},
        "the quantization_config has no config_groups",
    ),
    "quantized activations": (
        "compressed-tensors",
        lambda tensors: None,
        {"config_groups": {"g": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}}},
        "config_groups.g.input_activations: quantized activations are not supported",
    ),
    "nothing that is quantized": (
        "AWQ",
        lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("qweight")],
        {},
        "has no tensor called qweight, though it is to be quantized (AWQ)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named(case: str, sound: Callable[[str], Path], tmp_path: Path) -> None:
    name, change, config, message = CASES[case]
    assert_refused(damaged(sound(name), tmp_path, change, **config), message)


def test_the_same_copy_undamaged_is_read(sound: Callable[[str], Path], tmp_path: Path) -> None:
    for name in WRITERS:
        folder = tmp_path / name
        folder.mkdir()
        result, output = export(damaged(sound(name), folder, lambda tensors: None))
        assert result.returncode == 0 and (output / "model.safetensors").is_file(), result.stderr


def test_a_half_written_file(sound: Callable[[str], Path], tmp_path: Path) -> None:
    folder = damaged(sound("GPTQ"), tmp_path, lambda tensors: None)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert_refused(folder, "model.safetensors")


def test_a_sparse_checkpoint_that_lost_its_scales(sound: Callable[[str], Path], tmp_path: Path) -> None:
    """The same checks, where a sparse checkpoint is loaded."""
    from transformers import AutoModelForCausalLM

    result, output = export(damaged(sound("AWQ"), tmp_path, lambda tensors: None))
    assert result.returncode == 0
    tensors = tensors_of(output)
    del tensors[f"{UP}.scales"]
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SCAPError, match=f"{UP}.scales is missing"):
        AutoModelForCausalLM.from_pretrained(output)


def test_flags_of_quantization(sound: Callable[[str], Path], tmp_path: Path) -> None:
    folder = damaged(sound("GPTQ"), tmp_path, lambda tensors: None)
    assert_refused(folder, "the model is quantized already", "--weight-format", "int8")
    assert_refused(folder, "--group-size needs --weight-format", "--group-size", "32")
    assert_refused(folder, "--sym needs --weight-format", "--sym")


def test_group_sizes_that_do_not_divide() -> None:
    model = float_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for size, advice in ((48, "; 64, 32, 16 do, and -1"), (128, "; 64, 32, 16 do"), (0, "; 64"), (-2, "; 64")):
        with pytest.raises(
            SCAPError,
            match=f"--group-size: {size} does not divide the 64 input channels of layer "
            f"model.layers.0.self_attn.q_proj{advice}",
        ):
            quantize_weights(model, "int4", size)
    with pytest.raises(SCAPError, match="--group-size is for int4"):
        quantize_weights(model, "int8", 32)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_models_without_layers_to_quantize() -> None:
    from tiny_models import tiny_model

    with pytest.raises(SCAPError, match="no fully connected layer to quantize: the layers of its kind, Conv1D"):
        quantize_weights(tiny_model("gpt2"), "int8")


def test_offloaded_weights_of_another_library_are_named(sound: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sound("compressed-tensors"))
    model(torch.arange(8)[None])  # the library decompresses it then
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.data += 1.0
    with pytest.raises(SCAPError, match="its weights are no integers of 4 bits times their scales"):
        sparsify_activations(model, "0.5", [torch.arange(3, 99).view(2, 48)])
