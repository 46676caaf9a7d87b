"""Under f32 the C++ operations give the bits that OpenVINO's own give: no later threshold decides differently.

That is claimed for AVX-512 with VNNI, and for every version of OpenVINO: one that adds up in another order fails here.
With AMX or without AVX-512 it adds up in orders of its own, and test_fusion.py says how close results are.
"""

import os
import subprocess
import sys

import numpy as np
import openvino as ov
import pytest
from cpu import ISA_VARIABLE, ORDER_OF_SUMS, WITHOUT_AMX, has_amx, knows_the_order_of_sums
from openvino import opset13 as opset
from synthetic import FORMATS, HIDDEN, compressed, gated_ffn, linear, samples

from optimum_scap import SCAPConfig, sparsify_activations
from optimum_scap.openvino.fuse import fuse
from optimum_scap.openvino.inference import EXACT


is_claimed = pytest.mark.skipif(not knows_the_order_of_sums(), reason="the order of sums is claimed for AVX-512")


def assert_same_bits(portable: ov.Model, layers: int, inputs: list[np.ndarray]) -> None:
    fused = portable.clone()
    assert len(fuse(fused, precision="f32").fused) == layers
    for threads in (1, 2):
        config = EXACT | {"INFERENCE_NUM_THREADS": threads}
        expected, found = (ov.Core().compile_model(model, "CPU", config) for model in (portable, fused))
        for x in inputs:
            np.testing.assert_array_equal(found({"x": x})[0], expected({"x": x})[0], ORDER_OF_SUMS)


@pytest.mark.skipif(not has_amx(), reason="a CPU without AMX runs these tests in this process")
def test_a_cpu_with_amx_up_to_avx512() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", "-q", __file__],
        env=os.environ | {ISA_VARIABLE: WITHOUT_AMX},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-4000:]


@is_claimed
@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("weights", [name for name in FORMATS if name != "nf4"])
def test_ffn(weights: str, mode: str) -> None:
    data = samples(offset=0.3)
    portable = compressed(gated_ffn(bias=mode == "mean"), weights)
    sparsify_activations(portable, SCAPConfig.from_spec("up=0.4,gate=0.4,down=0.6", mode=mode), data)
    x = np.concatenate([sample["x"] for sample in data])
    assert x.shape[2] == HIDDEN
    many = x.reshape(1, -1, HIDDEN)
    inputs = [many[:, :tokens] for tokens in (1, 2, 5, 40, many.shape[1])]
    assert_same_bits(portable, 6, [*inputs, x[:2, :1], x[:, :3]])


@is_claimed
@pytest.mark.parametrize(
    ("weights", "in_features", "out_features"),
    [
        ("int8_asym", 1536, 576),
        ("int8_sym", 1536, 576),
        ("int4_asym", 1536, 576),
        ("int4_sym", 2048, 800),
        ("int8_asym", 1050, 640),  # no whole number of 16 channels
        ("int8_sym", 4096, 1000),
        ("int8_asym", 17, 33),
        ("f32", 2600, 64),
    ],
)
def test_sums_of_many_channels(weights: str, in_features: int, out_features: int) -> None:
    rng = np.random.default_rng(in_features)
    x = opset.parameter([-1, -1, in_features], np.float32, name="x")
    x.output(0).set_names({"x"})
    path = "model.layers.0.mlp.up_proj"
    model = ov.Model([opset.result(linear(x, in_features, out_features, path, rng, True, False))], [x], "layer")
    values = [rng.standard_normal((1, tokens, in_features)).astype(np.float32) for tokens in (1, 3, 5, 20, 64)]
    portable = compressed(model, weights)
    sparsify_activations(portable, SCAPConfig.from_spec("up=0.5"), [{"x": value} for value in values])
    assert_same_bits(portable, 1, values)
