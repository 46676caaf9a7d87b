"""One-token sparse linear layers on a GPU, beside cuBLAS and, where there are checkouts of them, other kernels.

    python examples/benchmarks/gpu_gemv.py --json gemv.json [--teal path/to/TEAL] [--cats path/to/CATS]
    python examples/benchmarks/gpu_gemv.py --weights int4 int8 --group-size 128 --json gemv-int.json

Integer weights run beside cuBLAS over float16 weights, torch's dense INT4 kernel (tinygemm, groups of 128) and, where
it is installed, GemLite.

Every figure is the median time of one launch in a CUDA graph that walks through more weights than the L2 cache holds,
with a new random input for each. `ideal` is the time it takes to read the weights of the kept channels (of a pair: of
both layers), and all scales, at the bandwidth of a large copy on the same GPU.
"""

import statistics
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_baselines import load_file
from scaffold import new_parser, write
from torch import Tensor
from torch.nn import functional as F

from optimum_scap.torch.kernels import sparse_linear_group
from optimum_scap.torch.kernels.configurations import configuration_for
from optimum_scap.torch.kernels.tuning import graph_time, normal_threshold
from optimum_scap.torch.weights import Weights, find_format


Shape = tuple[int, tuple[int, ...]]
SHAPES: dict[str, Shape] = {
    "4096x4096": (4096, (4096,)),
    "4096x1024": (4096, (1024,)),
    "4096x11008": (4096, (11008,)),
    "11008x4096": (11008, (4096,)),
    "4096x14336": (4096, (14336,)),
    "14336x4096": (14336, (4096,)),
    "4096x22016 pair": (4096, (11008, 11008)),
    "4096x12288 q, k, v": (4096, (4096, 4096, 4096)),
    "4096x6144 q, k, v": (4096, (4096, 1024, 1024)),
    "8192x28672": (8192, (28672,)),
    "28672x8192": (28672, (8192,)),
}
DTYPES = ("float16", "bfloat16", "float32")
POOL_BYTES = 3_400_000_000
SPARE_BYTES = 10_000_000
READ_PER_GRAPH = 400_000_000


class Problem:
    """As many weights of one shape as the pool holds, and an input for each."""

    def __init__(self, pool: Tensor, shape: Shape) -> None:
        self.in_features, self.out_features = shape
        features = sum(self.out_features)
        size = self.in_features * features
        self.copies = min(pool.numel() // size, 100)
        self.dense = pool[: self.copies * size].view(self.copies, features, self.in_features)
        blocks = pool[: self.copies * size].view(self.copies, size)
        sizes = [self.in_features * out for out in self.out_features]
        self.sparse = [
            [Weights("dense", (part.view(self.in_features, -1).t(),)) for part in block.split(sizes)]
            for block in blocks
        ]
        self.inputs = torch.randn(self.copies, 1, self.in_features, dtype=pool.dtype, device=pool.device)
        self.bytes = size * pool.element_size()
        self.scale_bytes = 0
        self.bits = 8 * pool.element_size()
        self.group_size: int | None = None

    def time(self, launch: Callable[[int], Any], sparsity: float = 0.0) -> float:
        """Median time in us of `launch(number of the copy)`."""
        count = max(6, int(READ_PER_GRAPH / (self.bytes * max(1 - sparsity, 0.01))))
        return graph_time([lambda number=number: launch(number) for number in range(min(count, self.copies))])

    def run_dense(self, number: int) -> Tensor:
        return F.linear(self.inputs[number], self.dense[number])

    def run_sparse(self, threshold: float) -> Callable[[int], Any]:
        count = len(self.out_features)
        return lambda number: sparse_linear_group(
            self.inputs[number],
            self.sparse[number],
            count * [None],
            thresholds=count * [threshold],
            modes=count * [0.0],
        )

    def run_other(self, kernel: "Baseline", threshold: float, sparsity: float) -> Callable[[int], Any]:
        return lambda number: kernel(self.inputs[number][None], self.sparse[number][0].tensors[0], threshold, sparsity)

    def check(self, threshold: float) -> float:
        """Relative error against float64 on the first copy."""
        outputs = self.run_sparse(threshold)(0)
        x = self.inputs[0].double()
        kept = torch.where(self.inputs[0].float().abs() <= threshold, 0.0, x)
        errors = []
        for y, weight in zip(outputs, self.sparse[0], strict=True):
            wanted = kept @ find_format(weight.format).dequantize(weight.tensors).double().t()
            errors.append(float((y.double() - wanted).norm() / wanted.norm()))
        return max(errors)


class IntegerProblem(Problem):
    """Random integers and float16 scales of one shape."""

    def __init__(self, shape: Shape, bits: int, group_size: int) -> None:
        self.in_features, self.out_features = shape
        self.bits, self.group_size = bits, group_size
        features = sum(self.out_features)
        self.bytes = self.in_features * features * bits // 8
        self.scale_bytes = self.in_features // group_size * features * 2
        self.copies = min(max(4, READ_PER_GRAPH // self.bytes), 100)
        self.sparse = [[self._random(size) for size in self.out_features] for _ in range(self.copies)]
        self.inputs = torch.randn(self.copies, 1, self.in_features, dtype=torch.float16, device="cuda")

    def _random(self, out_features: int) -> Weights:
        # Words of random bits are random integers; their layout is what `pack` makes of such a shape.
        tile = 8 * 32 // self.bits
        words = random_words(self.in_features, -(-out_features // tile) * 8)
        scales = torch.rand(self.in_features // self.group_size, out_features, device="cuda").half() / 100
        return Weights(f"int{self.bits}", (words, scales, torch.empty((0, 0), dtype=torch.uint8, device="cuda")))

    def time_cublas(self) -> float:
        copies = max(2, min(self.copies, 2 * READ_PER_GRAPH // (self.in_features * sum(self.out_features) * 2)))
        weights = torch.randn(copies, sum(self.out_features), self.in_features, dtype=torch.float16, device="cuda")
        return graph_time([lambda n=n: F.linear(self.inputs[n], weights[n]) for n in range(copies)])

    def time_tinygemm(self) -> float:
        """torch's dense INT4 kernel, with groups of 128; random bits are weights to it as well."""
        features = sum(self.out_features)
        weights = random_words(self.copies, features // 8, self.in_features // 128, 32, 4)
        scales = torch.rand(self.copies, self.in_features // 128, features, 2, device="cuda").bfloat16()
        x = self.inputs.bfloat16()
        run = torch.ops.aten._weight_int4pack_mm
        return graph_time([lambda n=n: run(x[n], weights[n], 128, scales[n]) for n in range(self.copies)])

    def time_gemlite(self) -> float | None:
        try:
            from gemlite import DType, GemLiteLinear
        except ImportError:
            return None
        features = sum(self.out_features)
        layers = []
        for _ in range(max(4, min(self.copies, READ_PER_GRAPH // 2 // self.bytes))):
            layer = GemLiteLinear(self.bits, self.group_size, self.in_features, features, DType.FP16, DType.FP16)
            integers = torch.randint(0, 1 << self.bits, (features, self.in_features), dtype=torch.uint8, device="cuda")
            groups = features * self.in_features // self.group_size
            scales = torch.rand(groups, 1, device="cuda").half() / 100
            layer.pack(integers, scales, torch.full_like(scales, 1 << self.bits - 1), None)
            layers.append(layer)
        for x, layer in zip(self.inputs, layers, strict=False):
            layer(x)
        return graph_time([lambda x=x, layer=layer: layer(x) for x, layer in zip(self.inputs, layers, strict=False)])


def random_words(*shape: int) -> Tensor:
    return torch.randint(-(1 << 31), (1 << 31) - 1, shape, dtype=torch.int32, device="cuda")


def copy_bandwidth(pool: Tensor) -> float:
    """Bytes read and written per second by a copy within the pool."""
    half = pool.numel() // 2
    times = []
    for _ in range(9):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        pool[half : 2 * half].copy_(pool[:half])
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return 2 * half * pool.element_size() / statistics.median(times)


# (input [1, 1, in], weight [out, in] input-channel-major, threshold, sparsity) -> output
Baseline = Callable[[Tensor, Tensor, float, float], Tensor]


def baselines(teal: Path | None, cats: Path | None) -> dict[str, Baseline]:
    """The kernels of the checkouts that the user has."""
    found: dict[str, Baseline] = {}
    if teal is not None:
        # Its wrapper for torch.compile, which needs another package, plays no part here.
        sys.modules.setdefault("compile_wrapper", types.SimpleNamespace(BaseKernel=object))  # type: ignore[arg-type]
        teal_gemv = load_file(teal / "kernels" / "sparse_gemv.py").splitk_sparse_gemv
        found["TEAL"] = lambda x, weight, threshold, sparsity: teal_gemv(x, weight, threshold, int(100 * sparsity))
    if cats is not None:
        cats_gemv = load_file(cats / "flash_gemv" / "flash_gemv" / "kernels.py").gather_transposed_gemv_flag_3d
        found["CATS"] = lambda x, weight, threshold, _: cats_gemv(x, weight.t(), x.abs() > threshold)
    return found


def measure(
    pool: Tensor, shapes: dict[str, Shape], sparsities: list[float], others: dict[str, Baseline], bandwidth: float
) -> list[dict[str, Any]]:
    rows = []
    for name, shape in shapes.items():
        problem = Problem(pool, shape)
        dense = problem.time(problem.run_dense)
        for sparsity in sparsities:
            threshold = normal_threshold(sparsity)
            row = measured(problem, name, sparsity, bandwidth) | {
                "dtype": str(pool.dtype).removeprefix("torch."),
                "dense_us": dense,
            }
            if len(problem.out_features) == 1 and pool.dtype == torch.float16:
                for other, kernel in others.items():
                    row[f"{other}_us"] = problem.time(problem.run_other(kernel, threshold, sparsity), sparsity)
            rows.append(row)
            print_row(row)
    return rows


def measure_integers(
    shapes: dict[str, Shape], sparsities: list[float], bits: int, group_size: int, bandwidth: float
) -> list[dict[str, Any]]:
    rows = []
    for name, shape in shapes.items():
        problem = IntegerProblem(shape, bits, group_size)
        others: dict[str, Any] = {"dense_us": problem.time_cublas()}
        if bits == 4:
            others["tinygemm_us"] = problem.time_tinygemm()
        gemlite = problem.time_gemlite()
        if gemlite is not None:
            others["GemLite_us"] = gemlite
        for sparsity in sparsities:
            row = measured(problem, name, sparsity, bandwidth)
            rows.append(row | {"dtype": f"int{bits}", "group_size": group_size} | others)
            print_row(rows[-1])
    return rows


def measured(problem: Problem, name: str, sparsity: float, bandwidth: float) -> dict[str, Any]:
    threshold = normal_threshold(sparsity)
    weights_format = problem.sparse[0][0].format
    configuration = configuration_for(
        problem.inputs[0], problem.out_features, problem.bits, weights_format, problem.group_size
    )
    return {
        "shape": name,
        "sparsity": sparsity,
        "us": problem.time(problem.run_sparse(threshold), sparsity),
        "ideal_us": (problem.bytes * (1 - sparsity) + problem.scale_bytes) / bandwidth * 1e6,
        "relative_error": problem.check(threshold),
        "configuration": vars(configuration),
    }


OTHERS = ("TEAL_us", "CATS_us", "tinygemm_us", "GemLite_us")


def print_row(row: dict[str, Any]) -> None:
    others = "".join(f"  {key.removesuffix('_us')} {row[key]:.1f}" for key in OTHERS if key in row)
    print(
        f"{row['shape']:>18} {row['dtype']:>8} {row['sparsity']:4.0%}  {row['us']:6.1f} us, "
        f"{row['ideal_us'] / row['us']:4.0%} of the ideal {row['ideal_us']:.1f}; cuBLAS dense {row['dense_us']:.1f}"
        f"{others}; error {row['relative_error']:.1e}",
        flush=True,
    )


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float16", "bfloat16", "float32"), default=["float16", "bfloat16"]
    )
    parser.add_argument("--weights", nargs="+", choices=("dense", "int4", "int8"), default=["dense"])
    parser.add_argument("--group-size", type=int, default=128, help="input channels that share a scale of integers")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.0, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--teal", type=Path, help="checkout of github.com/FasterDecoding/TEAL to compare with")
    parser.add_argument("--cats", type=Path, help="checkout of github.com/ScalingIntelligence/CATS to compare with")
    arguments = parser.parse_args()

    others = baselines(arguments.teal, arguments.cats)
    shapes = {name: SHAPES[name] for name in arguments.shapes}
    rows = []
    for bits in (int(name.removeprefix("int")) for name in arguments.weights if name != "dense"):
        bandwidth = copy_bandwidth(torch.empty(POOL_BYTES // 2, dtype=torch.float16, device="cuda"))
        rows += measure_integers(shapes, arguments.sparsities, bits, arguments.group_size, bandwidth)
    for dtype in (getattr(torch, name) for name in arguments.dtypes if "dense" in arguments.weights):
        # The other kernels read past the end of a weight whose size is no multiple of their blocks.
        memory = torch.empty((POOL_BYTES + SPARE_BYTES) // dtype.itemsize, dtype=dtype, device="cuda").normal_(0, 0.02)
        pool = memory[: POOL_BYTES // dtype.itemsize]
        bandwidth = copy_bandwidth(pool)
        rows += measure(pool, shapes, arguments.sparsities, others, bandwidth)
        del memory, pool
    copy = f"{bandwidth / 1e12:.2f} TB/s"
    print(f"{torch.cuda.get_device_name()}, Triton {triton.__version__}, a copy moves {copy}")
    write(arguments.json, {"copy_bandwidth": copy, "rows": rows}, gpu=True)


if __name__ == "__main__":
    main()
