"""One-token sparse linear layers on a GPU, beside cuBLAS and, where there are checkouts of them, other kernels.

    python examples/benchmarks/gpu_gemv.py --json gemv.json [--teal path/to/TEAL] [--cats path/to/CATS]

Every figure is the median time of one launch in a CUDA graph that walks through more weights than the L2 cache holds,
with a new random input for each. `ideal` is the time it takes to read the weights of the kept channels (of a pair: of
both layers) at the bandwidth of a large copy on the same GPU.
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

from optimum_scap.torch.kernels import sparse_linear, sparse_linear_group
from optimum_scap.torch.kernels.configurations import configuration_for
from optimum_scap.torch.kernels.tuning import graph_time, normal_threshold


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
        self.sparse = [[part.view(self.in_features, -1).t() for part in block.split(sizes)] for block in blocks]
        self.inputs = torch.randn(self.copies, 1, self.in_features, dtype=pool.dtype, device=pool.device)
        self.bytes = size * pool.element_size()

    def time(self, launch: Callable[[int], Any], sparsity: float = 0.0) -> float:
        """Median time in us of `launch(number of the copy)`."""
        count = max(6, int(READ_PER_GRAPH / (self.bytes * max(1 - sparsity, 0.01))))
        return graph_time([lambda number=number: launch(number) for number in range(min(count, self.copies))])

    def run_dense(self, number: int) -> Tensor:
        return F.linear(self.inputs[number], self.dense[number])

    def run_sparse(self, threshold: float) -> Callable[[int], Any]:
        if len(self.out_features) == 1:
            return lambda number: sparse_linear(self.inputs[number], self.sparse[number][0], threshold=threshold)
        count = len(self.out_features)
        return lambda number: sparse_linear_group(
            self.inputs[number],
            self.sparse[number],
            count * [None],
            thresholds=count * [threshold],
            modes=count * [0.0],
        )

    def run_other(self, kernel: "Baseline", threshold: float, sparsity: float) -> Callable[[int], Any]:
        return lambda number: kernel(self.inputs[number][None], self.sparse[number][0], threshold, sparsity)

    def check(self, threshold: float) -> float:
        """Relative error against float64 on the first copy."""
        outputs = self.run_sparse(threshold)(0)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        x = self.inputs[0].double()
        kept = torch.where(self.inputs[0].float().abs() <= threshold, 0.0, x)
        errors = []
        for y, weight in zip(outputs, self.sparse[0], strict=True):
            wanted = kept @ weight.double().t()
            errors.append(float((y.double() - wanted).norm() / wanted.norm()))
        return max(errors)


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
        configuration = configuration_for(problem.inputs[0], problem.out_features, 8 * pool.element_size())
        for sparsity in sparsities:
            threshold = normal_threshold(sparsity)
            row = {
                "shape": name,
                "dtype": str(pool.dtype).removeprefix("torch."),
                "sparsity": sparsity,
                "us": problem.time(problem.run_sparse(threshold), sparsity),
                "dense_us": dense,
                "ideal_us": problem.bytes * (1 - sparsity) / bandwidth * 1e6,
                "relative_error": problem.check(threshold),
                "configuration": vars(configuration),
            }
            if len(problem.out_features) == 1 and pool.dtype == torch.float16:
                for other, kernel in others.items():
                    row[f"{other}_us"] = problem.time(problem.run_other(kernel, threshold, sparsity), sparsity)
            rows.append(row)
            print_row(row)
    return rows


def print_row(row: dict[str, Any]) -> None:
    others = "".join(f"  {key.removesuffix('_us')} {row[key]:.1f}" for key in ("TEAL_us", "CATS_us") if key in row)
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
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.0, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--teal", type=Path, help="checkout of github.com/FasterDecoding/TEAL to compare with")
    parser.add_argument("--cats", type=Path, help="checkout of github.com/ScalingIntelligence/CATS to compare with")
    arguments = parser.parse_args()

    others = baselines(arguments.teal, arguments.cats)
    shapes = {name: SHAPES[name] for name in arguments.shapes}
    rows = []
    for dtype in (getattr(torch, name) for name in arguments.dtypes):
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
