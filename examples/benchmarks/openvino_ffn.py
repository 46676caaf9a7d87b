"""One FFN of a 1B and of a 7B model on this CPU, dense and sparse, with INT4 and INT8 weights: under a minute.

What one token takes in the layers that SCAP is made for, on your machine. Dense is stock OpenVINO, sparse the C++
operation, both at OpenVINO's defaults, in turn. Every model is several FFNs with weights of their own, more than the
caches hold; thresholds are calibrated, so that the sparsity is real.
"""

import time
from collections.abc import Iterator

import numpy as np
import openvino as ov
from compressed_weights import compressed_linear
from openvino import opset13 as opset
from scaffold import new_parser, write

from optimum_scap import sparsify_activations
from optimum_scap.commands.tables import print_report
from optimum_scap.evaluation.machine import describe_machine
from optimum_scap.evaluation.report import Quantity, Report
from optimum_scap.openvino.arithmetic import preferred_precision
from optimum_scap.openvino.extension.build import build_extension
from optimum_scap.openvino.fuse import fuse


SHAPES = {"1B": (2048, 8192), "7B": (4096, 11008)}  # hidden and inner features, of Llama-3.2-1B and Llama-2-7B
GROUP_SIZE = 128
STREAMED_BYTES = 256 << 20  # more than the caches of a few cores


class RandomFFNs:
    """A chain of gated FFNs with random weights, as NNCF compresses them."""

    def __init__(self, hidden: int, inner: int, bits: int) -> None:
        self._rng = np.random.default_rng(0)
        self._bits = bits
        self._kept: list[np.ndarray] = []  # what the constants of the weights point to
        self.count = max(2, -(-STREAMED_BYTES * 8 // (3 * hidden * inner * bits)))
        x = opset.parameter([-1, -1, hidden], np.float32, name="x")
        x.output(0).set_names({"x"})
        value = x
        for number in range(self.count):
            path = f"layers.{number}.mlp"
            normal = opset.mvn(value, opset.constant(np.array([-1])), True, 1e-6, "inside_sqrt")
            gate = self._linear(normal, hidden, inner, f"{path}.gate_proj")
            up = self._linear(normal, hidden, inner, f"{path}.up_proj")
            down = self._linear(opset.multiply(opset.swish(gate), up), inner, hidden, f"{path}.down_proj")
            value = opset.add(value, down)
        self.model = ov.Model([opset.result(value)], [x], "ffn")

    def _linear(self, x: ov.Node, inputs: int, outputs: int, path: str) -> ov.Node:
        groups = inputs // GROUP_SIZE if self._bits == 4 else 1
        # 1 / sqrt(inputs) is the standard deviation of the weights.
        scales = np.full((outputs, groups), inputs**-0.5 / (2**self._bits / 12**0.5), np.float16)
        self._kept.append(self._rng.integers(0, 256, outputs * inputs * self._bits // 8, np.uint8))
        node = compressed_linear(x, self._kept[-1], scales, outputs, self._bits)
        node.set_friendly_name(f"__module.{path}/aten::linear/MatMul")
        return node

    def samples(self, count: int, tokens: int) -> Iterator[dict[str, np.ndarray]]:
        hidden = self.model.inputs[0].partial_shape[2].get_length()
        for _ in range(count):
            yield {"x": self._rng.standard_normal((1, tokens, hidden), np.float32)}


def measure(ffns: RandomFFNs, sparsity: float, repeats: int) -> dict[str, list[float]]:
    """FFNs per second, of one token, by contestant."""
    sparse = sparsify_activations(ffns.model.clone(), f"{sparsity}", list(ffns.samples(4, 16)))
    fuse(sparse, precision=preferred_precision())
    requests = {
        name: ov.Core().compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
        for name, model in (("dense", ffns.model), ("SCAP", sparse))
    }
    rates: dict[str, list[float]] = {name: [] for name in requests}
    for repeat, sample in enumerate(ffns.samples(repeats + 2, 1)):
        for name, request in requests.items():
            started = time.perf_counter()
            request.infer(sample, share_inputs=True)
            if repeat > 1:
                rates[name].append(ffns.count / (time.perf_counter() - started))
    return rates


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--shape", action="append", choices=SHAPES, help="repeat for several (default: all)")
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    build_extension()
    quantities = []
    for name in arguments.shape or SHAPES:
        for bits in (4, 8):
            rates = measure(RandomFFNs(*SHAPES[name], bits), arguments.sparsity, arguments.repeats)
            quantities.append(
                Quantity(
                    name=f"{name}, {' x '.join(map(str, SHAPES[name]))}, INT{bits}",
                    unit="FFNs/s",
                    values={contestant: tuple(values) for contestant, values in rates.items()},
                    quartiles=True,
                )
            )
    report = Report(
        machine=describe_machine(),
        settings={"tokens": 1, "repeats": arguments.repeats},
        contestants={"dense": "stock OpenVINO", "SCAP": f"{arguments.sparsity:.0%} of the inputs pruned"},
        baseline="dense",
        quantities=tuple(quantities),
    )
    print_report(report)
    write(arguments.json, report)


if __name__ == "__main__":
    main()
