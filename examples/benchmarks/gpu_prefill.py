"""Prefill of a sparse model on the GPU: what the clock says, and how much of it the GPU works.

    python examples/benchmarks/gpu_prefill.py [--shape llama-7b] [--tokens 512 2048]

Random weights, dense and sparse models in turn. Short prompts wait for the host, which launches operations one after
another; the GPU's own time, the sum over its kernels by torch's profiler, does not depend on it.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_decode import SPECS
from random_models import SHAPES, random_llama
from scaffold import new_parser, write
from torch.profiler import ProfilerActivity, profile

from optimum_scap import SCAPConfig, sparsify_activations
from optimum_scap.commands.tables import print_report
from optimum_scap.evaluation.machine import describe_machine
from optimum_scap.evaluation.report import Quantity, Report
from optimum_scap.evaluation.torch_speed import DecodeLoop


PROFILED = 5


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(32000, (1, max(arguments.tokens)), generator=generator).to(device)
    calibration = [{"input_ids": torch.randint(32000, (1, 512), generator=generator)} for _ in range(2)]
    loops = {}
    for name, spec in {"dense": None, **SPECS}.items():
        model = random_llama(arguments.shape, device, getattr(torch, arguments.dtype))
        if spec:
            sparsify_activations(model, SCAPConfig.from_spec(spec), calibration)
        loops[name] = DecodeLoop(model, ids.shape[1], compiled=False)
    gpu = device.type == "cuda"
    quantities = []
    for tokens in arguments.tokens:
        prompt = ids[:, :tokens]
        speeds: dict[str, list[float]] = {name: [] for name in loops}
        for repeat in range(arguments.repeats + 2):
            for name, loop in loops.items():
                seconds = timed(device, lambda loop=loop, prompt=prompt: loop(prompt, 0))
                if repeat >= 2:
                    speeds[name].append(tokens / seconds)
        clock = {name: tuple(values) for name, values in speeds.items()}
        quantities.append(Quantity(name=f"prefill of {tokens} tokens", unit="tokens/s", values=clock, quartiles=True))
        if gpu:
            own = {name: (gpu_time(loop, prompt),) for name, loop in loops.items()}
            quantities.append(Quantity(name=f"the GPU's own time, {tokens} tokens", unit="ms", values=own))
    report = Report(
        machine=describe_machine(gpu=gpu),
        settings={"shape": arguments.shape, "dtype": arguments.dtype, "repeats": arguments.repeats},
        contestants={"dense": "random weights", **SPECS},
        baseline="dense",
        quantities=tuple(quantities),
    )
    print_report(report)
    write(arguments.json, report)


def timed(device: torch.device, run: Callable[[], Any]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def gpu_time(loop: DecodeLoop, prompt: torch.Tensor) -> float:
    """Milliseconds that the GPU works for one prefill."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED):
            loop(prompt, 0)
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiled.key_averages()) / PROFILED / 1000


if __name__ == "__main__":
    main()
