"""Models whose layers have names that no table knows, and the table itself."""

import re
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
import transformers as tf
from families import FAMILIES
from pydantic import ValidationError
from torch import nn

from optimum_scap import SCAPConfig, SCAPError, load_parameters, save_parameters, sparsify_activations
from optimum_scap.commands.flags import add_scap_flags, config_from_flags
from optimum_scap.core import roles
from optimum_scap.torch.backend import read_parameters


class Stranger(nn.Module):
    """Two gated blocks with names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleDict({"switch": nn.Linear(16, 32), "widen": nn.Linear(16, 32), "narrow": nn.Linear(32, 16)})
            for _ in range(2)
        )
        self.finish = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = x + stage["narrow"](stage["switch"](x).relu() * stage["widen"](x))
        return self.finish(x)


SAMPLES = [torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
ROLES = {r"switch$": "gate", r"\.widen$": "up", "narrow": "down"}


def flags(*arguments: str) -> SCAPConfig:
    parser = ArgumentParser()
    add_scap_flags(parser, required=True)
    return config_from_flags(parser.parse_args(arguments))


def test_the_message_lists_the_layers_and_says_how_to_name_them() -> None:
    with pytest.raises(SCAPError) as caught:
        sparsify_activations(Stranger(), "0.5", SAMPLES)
    message = str(caught.value)
    assert "the model has no layer of a known role" in message and "\n" not in message
    assert "stages.*.switch (2), stages.*.widen (2), stages.*.narrow (2), finish:" in message
    assert "roles={pattern: role} in SCAPConfig" in message
    # What it says can be given as it is.
    (example,) = re.findall(r"--scap-role '(.*?)'", message)
    config = flags("--scap", "0.5", "--scap-role", example)
    model = sparsify_activations(Stranger(), config, SAMPLES)
    assert {path: layer.role for path, layer in read_parameters(model).layers.items()} == {
        "stages.0.switch": "up",
        "stages.1.switch": "up",
    }


def test_layers_are_named_by_patterns(tmp_path: Path) -> None:
    config = flags(
        "--scap", "up=0.3,gate=0.3,down=0.5", *(f"--scap-role={role}={path}" for path, role in ROLES.items())
    )
    assert config == SCAPConfig.from_spec("up=0.3,gate=0.3,down=0.5", roles=ROLES)
    parameters = read_parameters(sparsify_activations(Stranger(), config, SAMPLES))
    assert {path.rpartition(".")[2]: layer.role for path, layer in parameters.layers.items()} == {
        "switch": "gate",
        "widen": "up",
        "narrow": "down",
    }
    assert parameters.layers["stages.0.narrow"].target_sparsity == 0.5
    save_parameters(parameters, tmp_path / "scap.json")
    assert load_parameters(tmp_path / "scap.json") == parameters
    assert load_parameters(tmp_path / "scap.json").config.roles == ROLES


def test_patterns_overrule_the_table_and_the_first_counts() -> None:
    config = SCAPConfig.from_spec("up=0.4", roles={"0.*down_proj": "o", "down_proj": "up", "up_proj": "down"})
    family = FAMILIES["llama"]
    parameters = read_parameters(sparsify_activations(family.build(), config, family.samples()))
    assert {path: layer.role for path, layer in parameters.layers.items()} == {"model.layers.1.mlp.down_proj": "up"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("up", "--scap-role 'up' is not of the form ROLE=REGEX"),
        ("side=x", "--scap-role: unknown role 'side', choose from q, k"),
        ("up=", "is not of the form"),
        ("up=(", "roles: .*not a regular expression"),
    ],
)
def test_bad_flags(given: str, message: str) -> None:
    with pytest.raises(SCAPError, match=message):
        flags("--scap", "0.5", "--scap-role", given)


def test_bad_roles() -> None:
    with pytest.raises(ValidationError, match="roles.x\n"):
        SCAPConfig(targets={"up": 0.5}, roles={"x": "side"})
    with pytest.raises(SCAPError, match="given two roles, up and down"):
        flags("--scap", "0.5", "--scap-role", "up=x", "--scap-role", "down=x")
    with pytest.raises(SCAPError, match="roles pattern 'absent' matches no fully connected layer"):
        sparsify_activations(Stranger(), SCAPConfig.from_spec("0.5", roles={"absent": "up"}), SAMPLES)


def test_a_config_without_roles_is_written_as_ever() -> None:
    assert "roles" not in SCAPConfig.from_spec("0.5").model_dump(mode="json")


# Architectures beside the families, and layers of models that bring code of their own.
FURTHER = {
    "GPTJForCausalLM": tf.GPTJConfig,
    "AlbertForMaskedLM": tf.AlbertConfig,
    "Wav2Vec2ForCTC": tf.Wav2Vec2Config,
    "DebertaV2ForMaskedLM": tf.DebertaV2Config,
    "Lfm2ForCausalLM": tf.Lfm2Config,
    "Qwen2VLForConditionalGeneration": tf.Qwen2VLConfig,
    "BlipForConditionalGeneration": tf.BlipConfig,
}
ELSEWHERE = (
    *("model.layers.0.self_attn.W_pack", "transformer.output_layer"),  # Baichuan, ChatGLM
    *("model.layers.0.attention.wqkv", "model.layers.0.attention.wo"),  # InternLM2
    *(f"layers.0.attention.w{name}" for name in "qkv"),  # Llama as Meta published it
    *(f"model.layers.0.mlp.experts.3.{name}" for name in ("gate", "up", "down")),  # thresholds of each expert
)


def test_every_entry_of_the_table_is_the_role_of_a_layer() -> None:
    paths = [*ELSEWHERE, *(path for family in FAMILIES.values() for path in family.expected)]
    with torch.device("meta"):
        for name, config in FURTHER.items():
            model = getattr(tf, name)(config())
            paths += [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    unused = {".".join(tail) for tail in roles._TAIL_TO_ROLE}
    for path in paths:
        parts = ["*" if part.isdigit() else part for part in path.split(".")]
        ends = [".".join(parts[-length:]) for length in range(len(parts), 0, -1)]
        unused.discard(next((end for end in ends if tuple(end.split(".")) in roles._TAIL_TO_ROLE), ""))
    assert not unused
