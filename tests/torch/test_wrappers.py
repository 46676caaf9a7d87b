"""Models in PEFT's adapters and in wrappers of torch: layers are pruned inside them, and known by their own paths."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from tiny_models import tiny_model, tiny_samples
from torch import nn

from optimum_scap import SCAPConfig, SCAPError, load_parameters, save_parameters, sparsify_activations
from optimum_scap.torch.backend import measure_sparsity, pruned_layers, read_parameters
from optimum_scap.torch.linear import SCAPLinear
from optimum_scap.torch.wrappers import saved_modules, unwrap


FFN = {f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up", "down")}
LORA = {"r": 2, "init_lora_weights": False}


def logits_of(model: nn.Module, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    with (
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
    ):  # compiling takes its time, and is tested elsewhere
        return model(**sample).logits


def adapted(config: peft.PeftConfig, name: str = "llama") -> tuple[Any, list[dict[str, torch.Tensor]]]:
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_model(name), config).eval(), tiny_samples(name)


def thresholds(model: nn.Module) -> dict[str, float]:
    return {path: module.scap_threshold for path, module in pruned_layers(model).items()}


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules=["up_proj", "down_proj"], **LORA),
        peft.LoraConfig(target_modules=["q_proj"], **LORA),
        peft.LoraConfig(target_modules=["up_proj", "q_proj"], use_dora=True, **LORA),
        peft.LoKrConfig(target_modules=["up_proj"], r=2),
        peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    ],
    ids=["lora", "lora beside", "dora", "lokr", "ia3"],
)
def test_layers_in_adapters_are_pruned(config: peft.PeftConfig, tmp_path: Path) -> None:
    model, samples = adapted(config)
    sparsify_activations(model, SCAPConfig.from_spec("0.4", mode="down=median"), samples)
    assert pruned_layers(model).keys() == read_parameters(model).layers.keys() == FFN
    for path, sparsity in measure_sparsity(model, samples).items():
        assert sparsity == pytest.approx(0.4, abs=0.01), path

    merged = model.merge_and_unload().eval()
    assert pruned_layers(merged).keys() == FFN and read_parameters(merged) is not None
    merged.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert thresholds(again) == thresholds(merged)
    assert torch.equal(logits_of(again, samples[0]), logits_of(merged, samples[0]))


def test_the_adapter_sees_what_is_not_pruned_yet() -> None:
    model, samples = adapted(peft.LoraConfig(target_modules=["down_proj"], **LORA))
    sparsify_activations(model, "down=0.4", samples)
    wrapper = unwrap(model).model.layers[0].mlp.down_proj
    layer = wrapper.base_layer
    assert type(layer) is SCAPLinear
    x = torch.randn(1, 7, layer.in_features)
    kept = torch.where(x.abs() > layer.scap_threshold, x, 0)
    with torch.no_grad():
        low_rank = wrapper.lora_B["default"](wrapper.lora_A["default"](x)) * wrapper.scaling["default"]
        torch.testing.assert_close(wrapper(x), kept @ layer.weight.T + low_rank, atol=1e-5, rtol=1e-4)


def test_thresholds_are_those_of_the_model_that_runs() -> None:
    """Those behind a merged adapter are those of the merged model, and nothing is left of the wrapper's name."""
    model, samples = adapted(peft.LoraConfig(target_modules=["up_proj"], **LORA))
    expected = copy.deepcopy(model).merge_and_unload()
    model.merge_adapter()
    for each in (model, expected):
        sparsify_activations(each, "0.4", samples)
    assert thresholds(model) == thresholds(expected)
    torch.testing.assert_close(logits_of(model, samples[0]), logits_of(expected, samples[0]))


def test_several_adapters() -> None:
    model, samples = adapted(peft.LoraConfig(target_modules=["up_proj"], **LORA))
    model.add_adapter("other", peft.LoraConfig(target_modules=["down_proj"], **LORA))
    model.set_adapter("other")
    sparsify_activations(model, "0.4", samples)
    assert pruned_layers(model).keys() == FFN
    outputs = []
    for name in ("default", "other"):
        model.set_adapter(name)
        outputs.append(logits_of(model, samples[0]))
    assert not torch.equal(*outputs)


def test_layers_that_are_trained_as_a_whole(tmp_path: Path) -> None:
    model, samples = adapted(peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["up_proj"], **LORA))
    model.double()  # merging rounds, and what lies next to a threshold must not cross it
    with torch.no_grad():
        for path, value in model.named_parameters():
            if "modules_to_save" in path:
                value.mul_(-2)
    sparsify_activations(model, "0.4", samples)
    assert pruned_layers(model).keys() == FFN
    wrapper = unwrap(model).model.layers[0].mlp.up_proj
    assert type(wrapper.modules_to_save["default"]) is type(wrapper.original_module) is SCAPLinear
    assert pruned_layers(model)["model.layers.0.mlp.up_proj"] is wrapper.modules_to_save["default"]
    sparsity = measure_sparsity(model, samples)
    assert all(value == pytest.approx(0.4, abs=0.01) for value in sparsity.values()) and sparsity.keys() == FFN
    before = logits_of(model, samples[0])
    with model.disable_adapter():
        assert pruned_layers(model)["model.layers.0.mlp.up_proj"] is wrapper.original_module
        assert not torch.equal(logits_of(model, samples[0]), before)

    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, samples[0]), before, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    assert pruned_layers(tf.AutoModelForCausalLM.from_pretrained(tmp_path)).keys() == FFN


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (peft.IA3Config(target_modules=["up_proj", "down_proj"], feedforward_modules=["down_proj"]), "ia3"),
        (peft.OFTConfig(target_modules=["down_proj"], oft_block_size=4), "oft"),
        (peft.HRAConfig(target_modules=["down_proj"], r=2), "hra"),
    ],
    ids=["ia3", "oft", "hra"],
)
def test_adapters_that_change_the_input(
    config: peft.PeftConfig, kind: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Merged, such an adapter is in the weights, and the layer gets another input than it was calibrated on."""
    model, samples = adapted(config)
    with pytest.raises(SCAPError, match=rf"down_proj: its adapter \({kind}\) does not pass its input on"):
        sparsify_activations(model, "down=0.4", samples)
    sparsify_activations(copy.deepcopy(model), "0.4", samples)
    assert f"2 layers are left dense; model.layers.0.mlp.down_proj: its adapter ({kind})" in caplog.text
    whole = sparsify_activations(tiny_model("llama"), "0.4", samples)
    with pytest.raises(SCAPError, match=rf"layer model\.layers\.0\.mlp\.down_proj cannot be .* adapter \({kind}\)"):
        sparsify_activations(model, read_parameters(whole))
    assert not pruned_layers(model)
    sparsify_activations(model.merge_and_unload(), "down=0.4", samples)


@pytest.mark.parametrize("training", [False, True])
def test_looking_at_adapters_leaves_no_trace(training: bool) -> None:
    model, samples = adapted(peft.LoraConfig(target_modules=["up_proj"], lora_dropout=0.5, **LORA))
    model.train(training)
    modes = {path: module.training for path, module in model.named_modules()}
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    with pytest.raises(SCAPError, match="the targets name qkv"):
        sparsify_activations(model, "qkv=0.4", samples)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {path: module.training for path, module in model.named_modules()} == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2),
    ],
    ids=["prompt tuning", "adaption prompt"],
)
def test_prompts_that_are_trained(config: peft.PeftConfig) -> None:
    model, samples = adapted(config)
    sparsify_activations(model, "q=0.4,up=0.4,gate=0.4,down=0.4", samples)
    names = FFN | {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}
    assert pruned_layers(model).keys() == names
    sparsify_activations(tiny_model("llama"), read_parameters(model))


def test_adapters_that_transformers_adds(caplog: pytest.LogCaptureFixture) -> None:
    model, samples = tiny_model("llama"), tiny_samples("llama")
    model.add_adapter(peft.LoraConfig(target_modules=["up_proj"], **LORA))
    sparsify_activations(model.eval(), "0.4", samples)
    assert pruned_layers(model).keys() == FFN
    assert "PEFT saves adapters without the model" in caplog.text


def test_what_peft_saves_goes_with_the_thresholds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, samples = adapted(peft.LoraConfig(target_modules=["up_proj", "down_proj"], **LORA))
    sparsify_activations(model, "0.4", samples)
    assert "PEFT saves adapters without the model" in caplog.text
    model.save_pretrained(tmp_path / "adapter")
    save_parameters(read_parameters(model), tmp_path / "scap.json")

    again = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter").eval()
    assert not pruned_layers(again)
    sparsify_activations(again, load_parameters(tmp_path / "scap.json"))
    assert torch.equal(logits_of(again, samples[0]), logits_of(model, samples[0]))


def test_an_adapter_on_a_sparse_checkpoint(tmp_path: Path) -> None:
    """Then the adapter's own folder names the sparse model, and is loaded with it."""
    base, samples = tiny_model("llama"), tiny_samples("llama")
    sparsify_activations(base, "0.4", samples)
    base.save_pretrained(tmp_path / "sparse")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    model = peft.get_peft_model(loaded, peft.LoraConfig(target_modules=["up_proj"], **LORA)).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert pruned_layers(again).keys() == FFN
    assert torch.equal(logits_of(again, samples[0]), logits_of(model, samples[0]))


def test_paths_of_older_files_are_understood() -> None:
    """Before wrappers were seen through, their names were stored too."""
    expected, samples = tiny_model("llama"), tiny_samples("llama")
    sparsify_activations(expected, "0.4", samples)
    found = read_parameters(expected)
    for old in ("base_model.model.{}", "base_model.model.{}.base_layer", "module.{}", "_orig_mod.{}"):
        renamed = found.model_copy(update={"layers": {old.format(path): each for path, each in found.layers.items()}})
        for model in (tiny_model("llama"), adapted(peft.LoraConfig(target_modules=["up_proj"], **LORA))[0]):
            sparsify_activations(model, renamed)
            assert thresholds(model) == thresholds(expected)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._checkpoint_wrapped_module = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._checkpoint_wrapped_module(*args, **kwargs)


def wrap_a_layer(model: Any) -> Any:
    model.model.layers[0].mlp = Checkpointed(torch.compile(model.model.layers[0].mlp, backend="eager"))
    return model


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "a layer": wrap_a_layer,
    "compiled adapter": lambda model: torch.compile(
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], r=2)), backend="eager"
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_leave_the_paths_alone(name: str) -> None:
    samples, expected = tiny_samples("llama"), tiny_model("llama")
    sparsify_activations(expected, "0.4", samples)
    for what, data in (("0.4", samples), (read_parameters(expected), None)):
        model = WRAPPERS[name](tiny_model("llama"))
        sparsify_activations(model, what, data)
        assert read_parameters(model).layers.keys() == FFN
        assert thresholds(model) == pytest.approx(thresholds(expected))
        found = logits_of(model, samples[0]).cpu()  # DataParallel runs where there is a GPU
        torch.testing.assert_close(found, logits_of(expected, samples[0]).cpu(), atol=1e-4, rtol=1e-4)


def test_names_that_are_the_models_own_stay() -> None:
    model = nn.Sequential()
    model.base_layer = nn.Sequential()
    model.base_layer.model = nn.Linear(2, 2)
    model.twice = model.base_layer.model
    assert [path for path, _ in saved_modules(model)] == ["", "base_layer", "base_layer.model"]
