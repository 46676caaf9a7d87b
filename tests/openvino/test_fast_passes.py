"""Calibration on the C++ operation finds what it finds on OpenVINO's own operations in f32."""

import numpy as np
import openvino as ov
import pytest
from synthetic import compressed, gated_ffn, samples

from optimum_scap import sparsify_activations
from optimum_scap.openvino import fast_passes
from optimum_scap.openvino.backend import measure_sparsity, read_parameters
from optimum_scap.openvino.extension.build import ExtensionBuildError
from optimum_scap.openvino.inference import EXACT


def kinds(model: ov.Model) -> list[str]:
    return sorted(node.get_type_name() for node in model.get_ops() if node.get_type_name() in ("MatMul", "SCAPLinear"))


def thresholds(model: ov.Model) -> dict[str, float]:
    parameters = read_parameters(model)
    assert parameters is not None
    return {path: layer.threshold for path, layer in parameters.layers.items()}


@pytest.fixture
def fast_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_passes, "is_fast_for_dense_int4", lambda library: True)


@pytest.mark.usefixtures("fast_cpu")
@pytest.mark.parametrize("weights", ["int8_asym", "int8_sym", "int4_asym", "int4_sym"])
@pytest.mark.parametrize("spec", ["up=0.4,gate=0.4,down=0.5", "up,median,0.4,down,mean,0.5"])
def test_the_same_thresholds(monkeypatch: pytest.MonkeyPatch, weights: str, spec: str) -> None:
    data = samples(offset=0.5)
    fast = sparsify_activations(compressed(gated_ffn(bias=True), weights), spec, data)
    realized = measure_sparsity(fast, data)
    monkeypatch.setattr(fast_passes, "is_fast_for_dense_int4", lambda library: False)
    exact = sparsify_activations(compressed(gated_ffn(bias=True), weights), spec, data)
    assert thresholds(fast) == pytest.approx(thresholds(exact), rel=0.01)
    assert realized == pytest.approx(measure_sparsity(exact, data), abs=0.01)
    assert kinds(fast) == kinds(exact) == 6 * ["MatMul"]  # of the model itself nothing is replaced


@pytest.mark.usefixtures("fast_cpu")
def test_integer_layers_run_as_the_operation_and_float_layers_do_not() -> None:
    model = compressed(gated_ffn(), "int8_sym")
    x = samples(1)[0]["x"]
    exact = ov.Core().compile_model(model.clone(), "CPU", EXACT)({"x": x})[0]
    fast_passes.speed_up(model)
    assert kinds(model) == 4 * ["SCAPLinear"]  # gate and up are one
    found = ov.Core().compile_model(model, "CPU", EXACT)({"x": x})[0]
    np.testing.assert_allclose(found, exact, atol=2e-3 * np.abs(exact).max())
    floats = gated_ffn()
    fast_passes.speed_up(floats)
    assert kinds(floats) == 6 * ["MatMul"]


def test_without_a_compiler_the_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ExtensionBuildError("no compiler")

    monkeypatch.setattr(fast_passes, "build_extension", fail)
    model = compressed(gated_ffn(), "int8_sym")
    fast_passes.speed_up(model)
    assert kinds(model) == 6 * ["MatMul"]
