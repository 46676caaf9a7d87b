"""openvino_genai with continuous batching: a dense IR, the portable sparse one, and the fused one, in turn.

    python examples/benchmarks/serving.py dense-int8 scap-int8 --json serving.json

A number of requests arrive at once; each has a prompt of its own and generates as many tokens as the others. Measured
are the tokens that all of them generate per second of the whole run, prompts included; the seconds until the first
token of a request, on average; and the seconds between two of its tokens behind that. Models take turns within every
repeat, in an order that rotates, in one process and with OpenVINO's default settings. Needs `openvino-genai`.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scaffold import new_parser, write

from optimum_scap.commands.tables import print_report
from optimum_scap.evaluation.machine import describe_machine
from optimum_scap.evaluation.report import Quantity, Report
from optimum_scap.evaluation.speed import DENSE, PORTABLE, SCAP, realized_sparsity
from optimum_scap.folders import fuse_folder
from optimum_scap.openvino.genai import register_operations


@dataclass
class Served:
    """What one run of concurrent requests took, in seconds.

    Args:
        throughput: tokens per second of all requests together.
        first_token: until the first token of a request, on average.
        token: between two tokens of a request behind its first, on average.
    """

    throughput: float
    first_token: float
    token: float


class Server:
    """A pipeline with continuous batching, and without what it could remember of earlier requests.

    Args:
        folder: a dense, portable or fused IR.
        cache_size: of keys and values, in GB.
    """

    def __init__(self, folder: Path, cache_size: int) -> None:
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = cache_size
        scheduler.enable_prefix_caching = False
        self._pipeline: Any = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU")
        self._next_request = 0

    def serve(self, prompts: Sequence[np.ndarray], new_tokens: int) -> Served:
        """Has a request for each of `prompts` `[1, tokens]` generate exactly `new_tokens` tokens, two or more."""
        import openvino as ov
        import openvino_genai as genai

        config = genai.GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, ignore_eos=True)
        started = time.perf_counter()
        handles = []
        for prompt in prompts:
            handles.append(self._pipeline.add_request(self._next_request, ov.Tensor(prompt), config))
            self._next_request += 1
        first: dict[int, float] = {}
        last: dict[int, float] = {}
        generated = 0
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter() - started
            for number, handle in enumerate(handles):
                while handle.can_read():
                    generated += sum(len(output.generated_ids) for output in handle.read().values())
                    first.setdefault(number, now)
                    last[number] = now
        seconds = time.perf_counter() - started
        if generated != len(prompts) * new_tokens:
            raise SystemExit(f"{generated} tokens were generated instead of {len(prompts) * new_tokens}")
        between = [(last[number] - first[number]) / (new_tokens - 1) for number in first]
        return Served(generated / seconds, float(np.mean(list(first.values()))), float(np.mean(between)))


def measure(
    servers: dict[str, Server], concurrency: Sequence[int], prompt_tokens: int, new_tokens: int, repeats: int
) -> list[Quantity]:
    """Three rows for each number of concurrent requests; a first round warms up and is not counted."""
    rng = np.random.default_rng(0)
    rows: dict[tuple[str, int], dict[str, list[float]]] = {}
    for repeat in range(-1, repeats):
        for requests in concurrency:
            prompts = [rng.integers(100, 20000, (1, prompt_tokens)) for _ in range(requests)]
            turn = repeat % len(servers)
            names = list(servers)
            for name in names[turn:] + names[:turn]:
                served = servers[name].serve(prompts, new_tokens)
                if repeat < 0:
                    continue
                for what, value in vars(served).items():
                    values = rows.setdefault((what, requests), {other: [] for other in servers})
                    values[name].append(value)
    units = {"throughput": "tokens/s", "first_token": "s", "token": "s"}
    return [
        Quantity(
            name=f"{what.replace('_', ' ')}, {requests} request{'s' if requests > 1 else ''}",
            unit=unit,
            values={name: tuple(found) for name, found in rows[what, requests].items()},
        )
        for what, unit in units.items()
        for requests in concurrency
    ]


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("dense", type=Path, help="folder of the dense IR")
    parser.add_argument("sparse", type=Path, help="folder of the portable sparse IR")
    parser.add_argument("--concurrency", type=int, nargs="+", default=(1, 2, 4, 8, 16))
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cache-size", type=int, default=1, help="GB of keys and values per model")
    arguments = parser.parse_args()
    if arguments.new_tokens < 2:
        parser.error("--new-tokens: 2 or more, for the time between two tokens")
    sparsity = realized_sparsity(arguments.sparse)
    register_operations()
    with tempfile.TemporaryDirectory() as folder:
        fused = Path(folder) / "fused"
        fused.mkdir()
        fuse_folder(arguments.sparse, fused)
        folders = {DENSE: arguments.dense, PORTABLE: arguments.sparse, SCAP: fused}
        servers = {name: Server(each, arguments.cache_size) for name, each in folders.items()}
        settings = {
            "concurrency": arguments.concurrency,
            "prompt_tokens": arguments.prompt_tokens,
            "new_tokens": arguments.new_tokens,
            "repeats": arguments.repeats,
        }
        quantities = measure(servers, **settings)
    report = Report(
        machine=describe_machine(),
        settings=settings,
        contestants={name: each.name for name, each in folders.items()},
        baseline=DENSE,
        quantities=tuple(quantities),
        sparsity={SCAP: sparsity},
    )
    print_report(report)
    write(arguments.json, report)


if __name__ == "__main__":
    main()
