"""The layers of PyTorch that are pruned in decoding alone, as an export makes an IR of them."""

import warnings

import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

from optimum_scap.core.parameters import LayerParameters
from optimum_scap.openvino.inference import EXACT
from optimum_scap.openvino.threshold_ops import find_threshold_ops
from optimum_scap.torch.convert import convert


IN = 16


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("mode", [0.0, 0.25])
def test_an_exported_layer_prunes_what_the_layer_does(rank: int, mode: float) -> None:
    torch.manual_seed(rank)
    layer = nn.Linear(IN, 8)
    method = "zero" if mode == 0 else "median"
    convert(layer, LayerParameters(method=method, target_sparsity=0.5, mode=mode, threshold=0.7), "decode")
    shape = ov.PartialShape([*[-1] * (rank - 1), IN])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and how OpenVINO converts
        model = ov.convert_model(layer, example_input=torch.randn(*[2] * (rank - 1), IN), input=[shape])
    (found,) = find_threshold_ops(model)
    assert found.decode_only and found.criterion.key == (mode, np.float32(0.7), None)
    compiled = ov.compile_model(model, "CPU", EXACT)
    for sequences, tokens in ((1, 1), (8, 1), (9, 1), (3, 4)):
        x = torch.randn(*{2: (tokens,), 3: (sequences, tokens), 4: (1, sequences, tokens)}[rank], IN)
        with torch.no_grad():
            expected = layer(x)
        np.testing.assert_allclose(compiled(x.numpy())[0], expected.numpy(), atol=1e-5)
