# SPDX-License-Identifier: Apache-2.0
"""One sparse linear layer on the CPU against OpenVINO's own compressed fully connected layer.

    python examples/benchmarks/openvino_linear.py --output linear.json

Both run at OpenVINO's defaults (precision, dynamic quantization, threads). Each model holds enough distinct layers on
one input that the weights stream from memory (`--stream-mib`); variants are timed in turn within every repetition, and
a ratio compares two timings of the same repetition. Thresholds are quantiles of the very activations that run, so the
sparsity is exact. The bandwidth is that of the bytes a variant needs (kept rows and their scales) over its time, next
to what a plain sequential read of the same amount of memory by the same number of threads reaches in the same
repetition.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import platform
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino as ov
from compressed_weights import compressed_linear
from openvino import opset13 as ops

from optimum_scap.openvino.arithmetic import DEFAULT_GROUP_SIZE
from optimum_scap.openvino.extension.build import build_extension, find_compiler
from optimum_scap.openvino.extension.nodes import create_linear
from optimum_scap.openvino.extension.packing import PackedLayer, pack_integer


# in x out: SmolLM2-135M, Qwen2.5-0.5B and -1.5B, Llama-3.2-1B and -3B, Llama-2-7B, Llama-3-8B
FFNS = ((576, 1536), (896, 4864), (1536, 8960), (2048, 8192), (3072, 8192), (4096, 11008), (4096, 14336))
SHAPES = {f"{inner}x{outer}": (inner, outer) for ffn in FFNS for inner, outer in (ffn, ffn[::-1])}
SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.9)
GROUP_SIZES = (128, 64)

READER = """
#include <cstdint>
#include <thread>
#include <vector>
static uint64_t read(const uint64_t* p, long n) {
    uint64_t sums[8] = {};
    for (long i = 0; i + 8 <= n; i += 8)
        for (int k = 0; k < 8; ++k) sums[k] |= p[i + k];
    return sums[0] | sums[1] | sums[2] | sums[3] | sums[4] | sums[5] | sums[6] | sums[7];
}
extern "C" uint64_t sequential_read(const uint64_t* p, long n, int threads) {
    std::vector<uint64_t> results(threads);
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t)
        pool.emplace_back([&, t] { results[t] = read(p + n / threads * t, n / threads); });
    uint64_t total = 0;
    for (int t = 0; t < threads; ++t) { pool[t].join(); total |= results[t]; }
    return total;
}
"""


def sequential_reader():
    """A function (array, threads) -> GB/s of one plain sequential read."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "reader.cpp", Path(folder) / "reader.so"
        source.write_text(READER)
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512"] if platform.machine() == "x86_64" else ["-O3"]
        subprocess.run([*find_compiler(), *flags, "-shared", "-fPIC", "-pthread", source, "-o", library], check=True)
        read = ctypes.CDLL(str(library)).sequential_read
    read.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int]
    read.restype = ctypes.c_uint64

    def bandwidth(array: np.ndarray, threads: int) -> float:
        start = time.perf_counter()
        read(array.ctypes.data, array.nbytes // 8, threads)
        return array.nbytes / (time.perf_counter() - start) / 1e9

    return bandwidth


class Weights:
    """The same random layer for both sides, copied so that every layer of a model has memory of its own."""

    def __init__(self, in_features: int, out_features: int, bits: int, group_size: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        groups = in_features // group_size if group_size else 1
        self.bits, self.group_size, self.shape = bits, group_size, (out_features, in_features)
        self.q = rng.integers(0, 1 << bits, self.shape, np.uint8)
        self.scale = (rng.random((out_features, groups)) * 0.01 + 0.001).astype(np.float16)
        zero = np.full((out_features, groups), 1 << (bits - 1), np.uint8)
        self.packed = pack_integer(self.q, self.scale, zero, bits=bits, signed=False, group_size=group_size)
        self.stored = self.q.reshape(-1)[::2] | self.q.reshape(-1)[1::2] << 4 if bits == 4 else self.q.reshape(-1)

    def stock(self, x: ov.Output, keep: list) -> ov.Node:
        keep.append(self.stored.copy())
        return compressed_linear(x, keep[-1], self.scale, self.shape[0], self.bits)

    def copy(self) -> PackedLayer:
        return replace(self.packed, buffer=self.packed.buffer.copy())

    def bytes_read(self, sparsity: float) -> float:
        return self.q.size * self.bits / 8 * (1 - sparsity) + self.scale.nbytes


def compile_models(weights: Weights, layers: int, x: np.ndarray, sparsities, keep: list) -> dict:
    """Infer requests by variant: stock, and one per sparsity. The SCAP models share their constants."""
    core = ov.Core()
    core.add_extension(str(build_extension()))
    in_features = weights.shape[1]
    parameter = ops.parameter([-1, in_features], np.float32)
    models = {"stock": ov.Model([weights.stock(parameter, keep) for _ in range(layers)], [parameter])}
    packed = [weights.copy() for _ in range(layers)]
    for sparsity in sparsities:
        threshold = float(np.quantile(np.abs(x), sparsity)) if sparsity else 0.0
        parameter = ops.parameter([-1, in_features], np.float32)
        nodes = [
            create_linear(parameter, [layer], threshold=threshold, activation_group_size=DEFAULT_GROUP_SIZE)
            for layer in packed
        ]
        models[sparsity] = ov.Model(nodes, [parameter])
    return {name: core.compile_model(model, "CPU").create_infer_request() for name, model in models.items()}


def summary(values: list[float]) -> dict:
    low, middle, high = np.percentile(values, [10, 50, 90])
    return {"median": float(middle), "p10": float(low), "p90": float(high)}


def measure(requests: dict, x: np.ndarray, layers: int, repetitions: int, extra=None) -> tuple[dict, list]:
    """Seconds per layer of each variant in each repetition, and what `extra` returned in each."""
    tensor = ov.Tensor(x)
    times: dict = {name: [] for name in requests}
    extras = []
    for repetition in range(-1, repetitions):
        for name, request in requests.items():
            request.set_input_tensor(tensor)
            start = time.perf_counter()
            request.start_async()  # leaves out the copies that the Python call makes of every output
            request.wait()
            if repetition >= 0:
                times[name].append((time.perf_counter() - start) / layers)
        if extra is not None and repetition >= 0:
            extras.append(extra())
    return times, extras


def benchmark_decode(weights: Weights, layers: int, repetitions: int, read, memory: np.ndarray, threads: int) -> list:
    keep: list = []
    x = np.random.default_rng(1).standard_normal((1, weights.shape[1])).astype(np.float32)
    requests = compile_models(weights, layers, x, SPARSITIES, keep)
    times, bandwidths = measure(requests, x, layers, repetitions, lambda: read(memory, threads))
    rows = []
    for sparsity in SPARSITIES:
        gbs = [weights.bytes_read(sparsity) / t / 1e9 for t in times[sparsity]]
        rows.append(
            {
                "rows": 1,
                "sparsity": sparsity,
                "stock_us": summary([t * 1e6 for t in times["stock"]]),
                "scap_us": summary([t * 1e6 for t in times[sparsity]]),
                "ratio": summary([s / t for s, t in zip(times["stock"], times[sparsity], strict=True)]),
                "gb_per_s": summary(gbs),
                "of_sequential_read": summary([g / b for g, b in zip(gbs, bandwidths, strict=True)]),
            }
        )
    return rows


def benchmark_rows(weights: Weights, layers: int, repetitions: int, row_counts) -> list:
    results = []
    keep: list = []
    x = np.random.default_rng(1).standard_normal((max(row_counts), weights.shape[1])).astype(np.float32)
    requests = compile_models(weights, layers, x, (0.0, 0.5), keep)
    for rows in row_counts:
        times, _ = measure(requests, x[:rows], layers, repetitions)
        for sparsity in (0.0, 0.5):
            results.append(
                {
                    "rows": rows,
                    "sparsity": sparsity,
                    "stock_us": summary([t * 1e6 for t in times["stock"]]),
                    "scap_us": summary([t * 1e6 for t in times[sparsity]]),
                    "ratio": summary([s / t for s, t in zip(times["stock"], times[sparsity], strict=True)]),
                }
            )
    return results


def print_table(name: str, results: list) -> None:
    print(f"\n{name}\n rows  sparsity   stock us    scap us   ratio [p10, p90]        GB/s   of sequential read")
    for r in results:
        ratio, line = r["ratio"], f"{r['rows']:5d}  {r['sparsity']:7.0%}  {r['stock_us']['median']:9.0f}"
        line += f"  {r['scap_us']['median']:9.0f}   {ratio['median']:5.2f} [{ratio['p10']:.2f}, {ratio['p90']:.2f}]"
        if "gb_per_s" in r:
            line += f"     {r['gb_per_s']['median']:6.1f}   {r['of_sequential_read']['median']:.0%}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="IN_X_OUT")
    parser.add_argument("--bits", nargs="+", type=int, choices=(4, 8), default=(8, 4))
    parser.add_argument("--group-sizes", nargs="+", type=int, default=GROUP_SIZES, help="of INT4")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--stream-mib", type=int, default=768, help="weights per model; must exceed the caches")
    parser.add_argument("--rows", nargs="*", type=int, default=(2, 4, 8, 16, 64, 256, 1024), help="besides decode")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()

    core = ov.Core()
    threads = core.compile_model(ov.Model([ops.relu(p := ops.parameter([1], np.float32))], [p]), "CPU").get_property(
        "INFERENCE_NUM_THREADS"
    )
    read = sequential_reader()
    memory = np.ones(args.stream_mib << 20, np.uint8)
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": core.get_property("CPU", "FULL_DEVICE_NAME"),
        "capabilities": core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
        "threads": threads,
        "openvino": ov.__version__,
        "stream_mib": args.stream_mib,
        "sequential_read_gb_per_s": summary([read(memory, threads) for _ in range(5)]),
        "layers": {},
    }
    print(f"{report['cpu']}, {threads} threads, OpenVINO {report['openvino']}, {report['date']}")
    print(f"sequential read: {report['sequential_read_gb_per_s']['median']:.1f} GB/s")
    for shape in args.shapes:
        for bits in args.bits:
            for group_size in args.group_sizes if bits == 4 else (0,):
                if group_size and SHAPES[shape][0] % group_size:
                    continue  # NNCF leaves such layers in INT8
                weights = Weights(*SHAPES[shape], bits, group_size)
                layers = -(-(args.stream_mib << 20) // weights.packed.buffer.size)
                results = benchmark_decode(weights, layers, args.repetitions, read, memory, threads)
                if args.rows:
                    results += benchmark_rows(weights, max(layers // 8, 2), max(args.repetitions // 2, 3), args.rows)
                name = f"{shape} int{bits}" + (f" g{group_size}" if group_size else "")
                report["layers"][name] = results
                print_table(name, results)
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
