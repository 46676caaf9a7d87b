"""Layers are judged by what they are: what is quantized, hooked or special in any other way is never pruned."""

import copy
from collections.abc import Callable
from typing import Any

import nncf
import pytest
import torch
from tiny_models import tiny_model, tiny_samples
from torch import nn
from transformers.integrations.bitnet import AutoBitLinear
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.pytorch_utils import Conv1D

from optimum_scap import SCAPConfig, SCAPError, SCAPParameters, sparsify_activations
from optimum_scap.core.parameters import LayerParameters
from optimum_scap.torch.linear import SCAPQuantizedLinear
from optimum_scap.torch.prunable import is_fully_connected, why_dense
from optimum_scap.torch.quantized import QuantizedLinear


LAYER = LayerParameters(role="up", method="zero", target_sparsity=0.5, mode=0.0, threshold=0.3)
UP = SCAPParameters(version="1", config=SCAPConfig.from_spec("up=0.5"), layers={"up_proj": LAYER})


class Block(nn.Module):
    def __init__(self, up_proj: nn.Module) -> None:
        super().__init__()
        self.up_proj, self.down_proj = up_proj, nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x).relu())


def with_weights(dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(128, 128, bias=False)
    layer.weight = nn.Parameter(torch.zeros(128, 128, dtype=torch.uint8).view(dtype), requires_grad=False)
    return layer


class Packed(torch.Tensor):
    """As torchao, bitsandbytes and quanto have weights."""


def with_class_of_weights() -> nn.Linear:
    layer = nn.Linear(128, 128)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
    return layer


def with_scheme() -> nn.Linear:
    """As compressed-tensors leaves a layer that it has decompressed."""
    layer: Any = nn.Linear(128, 128)
    layer.quantization_scheme = object()
    layer.register_parameter("weight_scale", nn.Parameter(torch.ones(1)))
    return layer


class ScalesOneTensorAlone(nn.Linear):
    """Computes what a linear layer does unless it holds scales."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = super().forward(input)
        return y * self.SCB if hasattr(self, "SCB") else y


def with_scales(name: str, register: Callable[..., None]) -> nn.Linear:
    layer = ScalesOneTensorAlone(128, 128)
    register(
        layer, name, nn.Parameter(torch.ones(128)) if register is nn.Module.register_parameter else torch.ones(128)
    )
    return layer


def quantized_by_torch() -> nn.Module:
    import torch.ao.nn.quantized.dynamic as quantized

    return quantized.Linear(128, 128)


def trained_for_quantization() -> nn.Module:
    import torch.ao.nn.qat as qat
    from torch.ao.quantization import get_default_qat_qconfig

    return qat.Linear(128, 128, qconfig=get_default_qat_qconfig())


def with_another_forward_below_accelerates() -> nn.Module:
    from accelerate.hooks import ModelHook, add_hook_to_module

    layer: Any = nn.Linear(128, 128)
    layer.forward = lambda x: 2 * x
    return add_hook_to_module(layer, ModelHook())


class ScaledConv1D(Conv1D):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


FLOAT4 = getattr(torch, "float4_e2m1fn_x2", torch.float8_e4m3fn)
SPECIAL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "FP8 of transformers": (lambda: FP8Linear(128, 128, block_size=(128, 128)), r"quantized \(float8_e4m3fn\)"),
    "float8_e4m3fn": (lambda: with_weights(torch.float8_e4m3fn), r"quantized \(float8_e4m3fn\)"),
    "float8_e5m2": (lambda: with_weights(torch.float8_e5m2), r"quantized \(float8_e5m2\)"),
    "float8_e4m3fnuz": (lambda: with_weights(torch.float8_e4m3fnuz), r"quantized \(float8_e4m3fnuz\)"),
    "float8_e8m0fnu": (
        lambda: with_weights(getattr(torch, "float8_e8m0fnu", torch.float8_e5m2)),
        r"quantized \(float8_e",
    ),
    "float4": (lambda: with_weights(FLOAT4), r"quantized \(float"),
    "int8": (lambda: with_weights(torch.int8), r"quantized \(int8\)"),
    "a class of tensors": (with_class_of_weights, r"quantized \(Packed\)"),
    "compressed-tensors": (with_scheme, r"quantized \(weight_scale\)"),
    "scales as a parameter": (
        lambda: with_scales("SCB", nn.Module.register_parameter),
        r"more than weights and a bias \(SCB\)",
    ),
    "scales as a buffer": (lambda: with_scales("SCB", nn.Module.register_buffer), r"more than weights .* \(SCB\)"),
    "FP8 with weights of another dtype": (
        lambda: FP8Linear(128, 128, block_size=(128, 128)).to(torch.bfloat16),
        r"more than weights and a bias \(weight_scale_inv\)",
    ),
    "BitNet": (lambda: AutoBitLinear(128, 128), r"more than weights and a bias \(weight_scale\)"),
    "quantized by torch": (quantized_by_torch, "it is a Linear, not a fully connected layer"),
    "trained for quantization": (trained_for_quantization, "forward of Linear is not that of nn.Linear"),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(128, 128)), "computed from others"),
    "old weight norm": (
        lambda: nn.utils.weight_norm(nn.Linear(128, 128)),
        r"computed from others \(weight_g, weight_v\)",
    ),
    "another forward below accelerate's": (with_another_forward_below_accelerates, "its forward was replaced"),
    "a Conv1D of another kind": (lambda: ScaledConv1D(128, 128), "forward of ScaledConv1D is not that of Conv1D"),
}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.filterwarnings("ignore")
def test_special_layers_are_refused_and_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, reason = SPECIAL[name]
    model = Block(make())
    cls = type(model.up_proj)
    assert not is_fully_connected(model.up_proj)
    with pytest.raises(SCAPError, match=f"layer up_proj cannot be pruned: .*{reason}"):
        sparsify_activations(model, UP)
    with pytest.raises(SCAPError, match="no fully connected layer is left to prune.*; up_proj: "):
        sparsify_activations(model, "up=0.5", [torch.randn(4, 128)])
    assert type(model.up_proj) is cls


def test_ordinary_layers_are_not_suspected() -> None:
    class Named(nn.Linear):
        pass

    class CountsItsCalls(nn.Linear):
        """Plain, with a buffer that its forward does not know."""

        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            self.register_buffer("calls", torch.zeros(1))

    for layer in (nn.Linear(4, 4), Named(4, 4), CountsItsCalls(4, 4), nn.Linear(4, 4).double(), Conv1D(4, 4)):
        assert why_dense(layer) is None and is_fully_connected(layer)


def test_a_layer_that_is_quantized_stays_dense_beside_one_that_is_not(caplog: pytest.LogCaptureFixture) -> None:
    model = Block(nn.Linear(128, 128))
    model.up_proj.gate_proj = FP8Linear(128, 128, block_size=(128, 128))  # which nobody calls
    sparsify_activations(model, "0.5", [torch.randn(64, 128)])
    assert "1 layers are left dense; up_proj.gate_proj: its weights are quantized (float8_e4m3fn)" in caplog.text


def test_models_that_are_quantized_in_part() -> None:
    """The checkpoint of a model names one method: with ours in its place the quantized layers could not be loaded."""
    from transformers import FineGrainedFP8Config
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    model, samples = tiny_model("llama"), tiny_samples("llama")
    model.hf_quantizer = FineGrainedFP8HfQuantizer(FineGrainedFP8Config(modules_to_not_convert=["mlp"]))
    with pytest.raises(SCAPError, match=r"the model is quantized \(fp8\)"):
        sparsify_activations(model, "0.5", samples)
    parameters = SCAPParameters(version="1", config=UP.config, layers={"model.layers.0.mlp.up_proj": LAYER})
    with pytest.raises(SCAPError, match=r"the model is quantized \(fp8\)"):
        sparsify_activations(model, parameters)
    model.hf_quantizer.remove_quantization_config(model)  # as from_pretrained does when it has dequantized a model
    sparsify_activations(model, parameters)


def test_models_of_nncf() -> None:
    samples = [torch.randn(64, 128)]
    model = nncf.compress_weights(
        Block(nn.Linear(128, 128)), mode=nncf.CompressWeightsMode.INT8_ASYM, dataset=nncf.Dataset(samples)
    )
    with pytest.raises(SCAPError, match="no layer of the model has the role gate|no fully connected layer"):
        sparsify_activations(copy.deepcopy(model), "gate=0.5", samples)
    sparsify_activations(model, UP)
    assert type(model.up_proj) is SCAPQuantizedLinear and type(model.down_proj) is QuantizedLinear

    from nncf.torch.function_hook import register_pre_function_hook, wrap_model

    wrapped = wrap_model(Block(nn.Linear(128, 128)))
    sparsify_activations(copy.deepcopy(wrapped), "0.5", samples)  # there is no hook yet
    register_pre_function_hook(wrapped, "up_proj/linear/0", 0, nn.Hardtanh())
    for what, data in ((UP, None), ("0.5", samples)):
        with pytest.raises(SCAPError, match="by NNCF already"):
            sparsify_activations(wrapped, what, data)
