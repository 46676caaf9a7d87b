"""The operation that vLLM's layers call, as vLLM runs it on a GPU, beside F.linear.

    python examples/benchmarks/gpu_serving.py --json gpu-serving.json

A layer is compiled once, for any number of rows and with all guards dropped, captured in a CUDA graph at each number
of padded rows, replayed with other inputs, and compared with the formula in float64. Then three ways are timed at each
number of rows: F.linear, the sparse operation (up to 8 rows) and the product of the pruned input. Rows are drawn
independently, the worst case for the sparse operation: n rows keep the union of what each keeps, 1 - sparsity^n.

Times are medians of one launch in a CUDA graph that walks through more weights than the L2 cache holds.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from scaffold import new_parser, write
from torch import Tensor
from torch.nn import functional as F

from optimum_scap.torch.kernels.tuning import graph_time, normal_threshold
from optimum_scap.vllm.operation import Part, fold, served_linear


# in_features, and the outputs of what vLLM joins, each with a threshold of its own if `--own-thresholds`
SHAPES = {
    "qkv 4096x6144": (4096, (4096, 1024, 1024)),
    "o 4096x4096": (4096, (4096,)),
    "gate, up 4096x28672": (4096, (14336, 14336)),
    "down 14336x4096": (14336, (4096,)),
}
ROWS = (1, 2, 4, 8, 16, 32, 64)
CAPTURED_ROWS = (1, 2, 4, 8, 16)
READ_PER_GRAPH = 400_000_000


def drop_guards(guards: Sequence[Any]) -> list[bool]:
    """As vLLM does: the compiled program is not asked whether it fits."""
    return [False] * len(guards)


def check_captured(dtype: torch.dtype) -> dict[str, float]:
    """The largest error relative to the largest output, by number of captured rows.

    The last quarter of the rows is padding that holds what an earlier step left there, NaN included.
    """
    torch.manual_seed(0)
    in_features, sizes = 2048, (1024, 256, 256)
    weight = torch.randn(in_features, sum(sizes), device="cuda", dtype=dtype).t() / in_features**0.5
    scale = torch.rand(in_features, device="cuda") + 0.5
    parts = [Part(1024, 0.6, 0.125), Part(256, 0.4, 0.0, scale), Part(256)]
    bias = torch.randn(sum(sizes), device="cuda", dtype=dtype)
    biases = fold(weight, parts, bias, None)

    def layer(x: Tensor) -> Tensor:
        return served_linear(x * 2.0, weight, biases, parts, False)

    compiled = torch.compile(
        layer,
        fullgraph=True,
        dynamic=True,
        options={"guard_filter_fn": drop_guards},
    )
    first = torch.randn(40, in_features, device="cuda", dtype=dtype)
    torch._dynamo.mark_dynamic(first, 0)
    compiled(first)
    errors = {}
    for rows in CAPTURED_ROWS:
        held = torch.randn(rows, in_features, device="cuda", dtype=dtype)
        for _ in range(2):
            compiled(held)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = compiled(held)
        real = rows - rows // 4
        x = torch.randn(real, in_features, device="cuda", dtype=dtype)
        held.fill_(torch.nan)
        held[:real] = x
        graph.replay()
        wanted = expected(x * 2.0, weight, parts, bias)
        errors[str(rows)] = float((output[:real].double() - wanted).abs().max() / wanted.abs().max())
    return errors


def expected(x: Tensor, weight: Tensor, parts: list[Part], bias: Tensor) -> Tensor:
    outputs = []
    for part, rows in zip(parts, weight.split([part.size for part in parts]), strict=True):
        distance = (x.float() - part.mode).abs() * (1.0 if part.scale is None else part.scale)
        kept = torch.where(distance > part.threshold, x.double(), float(part.mode))
        outputs.append(kept @ rows.double().t())
    return torch.cat(outputs, dim=-1) + bias.double()


def time_shape(in_features: int, sizes: tuple[int, ...], dtype: torch.dtype, sparsity: float, own: bool) -> list[Any]:
    out_features = sum(sizes)
    threshold = normal_threshold(sparsity)
    # Criteria that differ in nothing that counts keep the parts apart.
    parts = [Part(size, threshold * (1 + number * 1e-6)) for number, size in enumerate(sizes)]
    if not own:
        parts = [Part(out_features, threshold)]
    bytes_of_one = in_features * out_features * dtype.itemsize
    copies = max(6, READ_PER_GRAPH // bytes_of_one)
    dense = [torch.randn(out_features, in_features, device="cuda", dtype=dtype) for _ in range(copies)]
    sparse = [weight.t().contiguous().t() for weight in dense]
    biases = fold(sparse[0], parts, None, None)
    found = []
    for rows in ROWS:
        inputs = [torch.randn(rows, in_features, device="cuda", dtype=dtype) for _ in range(copies)]

        def served(number: int, limit: int, inputs: list[Tensor] = inputs) -> Tensor:
            return served_linear(inputs[number], sparse[number], biases, parts, False, limit)

        def linear(number: int, inputs: list[Tensor] = inputs) -> Tensor:
            return F.linear(inputs[number], dense[number])

        times = {"dense": graph_time([lambda n=n: linear(n) for n in range(copies)])}  # type: ignore[misc]
        if rows <= 8:
            times["sparse"] = graph_time([lambda n=n: served(n, 8) for n in range(copies)])  # type: ignore[misc]
        times["pruned"] = graph_time([lambda n=n: served(n, 0) for n in range(copies)])  # type: ignore[misc]
        found.append({"rows": rows, **{name: round(time, 2) for name, time in times.items()}})
    return found


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=("float16", "bfloat16"))
    parser.add_argument("--sparsity", type=float, default=0.5)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_serving.py measures on a GPU, and torch finds none")
    dtype = getattr(torch, arguments.dtype)
    with torch.inference_mode():
        errors = check_captured(dtype)
        print("captured rows: largest relative error", errors)
        timed: dict[str, Any] = {}
        for name, (in_features, sizes) in SHAPES.items():
            for own in (False, True) if len(sizes) > 1 else (False,):
                label = f"{name}, own thresholds" if own else name
                timed[label] = time_shape(in_features, sizes, dtype, arguments.sparsity, own)
                print(label)
                for row in timed[label]:
                    gains = {way: round(row["dense"] / row[way], 2) for way in ("sparse", "pruned") if way in row}
                    print("  ", row, gains, flush=True)
    figures = {"dtype": arguments.dtype, "sparsity": arguments.sparsity, "errors": errors, "us": timed}
    write(arguments.json, figures, gpu=True)
    if any(not error < 0.02 for error in errors.values()):
        sys.exit("a captured graph gave something else than the formula")


if __name__ == "__main__":
    main()
