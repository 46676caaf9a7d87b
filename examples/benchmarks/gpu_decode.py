"""Tokens per second of a 7B-shaped model on the GPU, dense and sparse in one run.

Random weights; thresholds are calibrated, so that the sparsity is real, and what is realised on the measured tokens is
printed. All models take turns in one process. The loop is a static cache and one step of one token, compiled as a CUDA
graph; `--generate` measures transformers' own `generate(cache_implementation="static")` too.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from random_models import SHAPES, random_llama
from rich.console import Console
from rich.table import Table

from optimum_scap import SCAPConfig, sparsify_activations
from optimum_scap.evaluation.torch_benchmark import DecodeLoop, realised_sparsity


SPECS = {
    "FFN 35/55 %": "up=0.35,gate=0.35,down=0.55",
    "all FC 50 %": "q=0.5,k=0.5,v=0.5,o=0.5,up=0.5,gate=0.5,down=0.5",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--scap", action="append", help="specification; repeat for several")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--generate", action="store_true", help="measure transformers' generate() as well")
    parser.add_argument("--eager", action="store_true", help="do not compile the step (a trial on a CPU)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(32000, (1, arguments.prompt_tokens + arguments.new_tokens), generator=generator).to(device)
    calibration = [{"input_ids": torch.randint(32000, (1, 256), generator=generator)} for _ in range(4)]
    specs = {spec: spec for spec in arguments.scap} if arguments.scap else SPECS
    models: dict[str, Any] = {"dense": random_llama(arguments.shape, device, dtype)}
    memory = {"dense": _allocated(device)}
    for name, spec in specs.items():
        before = _allocated(device)
        models[name] = random_llama(arguments.shape, device, dtype)
        sparsify_activations(models[name], SCAPConfig.from_spec(spec), calibration)
        memory[name] = _allocated(device) - before
    sparsity = {name: realised_sparsity(models[name], ids) for name in specs}
    loops = {name: DecodeLoop(model, ids.shape[1], not arguments.eager) for name, model in models.items()}
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    split = arguments.prompt_tokens
    for repeat in range(arguments.repeats + 2):  # compiling and recording, then a run of what was recorded
        for name, loop in loops.items():
            seconds = _timed(device, lambda loop=loop: loop(ids[:, :split], 0))
            steps = _timed(device, lambda loop=loop: _steps(loop, ids, split))
            if repeat >= 2:
                prefill[name].append(split / seconds)
                decode[name].append(arguments.new_tokens / steps)
    generate = _measure_generate(models, ids[:, :32], device, arguments) if arguments.generate else {}

    result = {
        "machine": describe_machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "model": f"{arguments.shape}, random weights, {arguments.dtype}",
        "prompt tokens": split,
        "new tokens": arguments.new_tokens,
        "prefill tok/s": prefill,
        "decode tok/s": decode,
        "generate tok/s": generate,
        "weights MiB": {name: value / 2**20 for name, value in memory.items()},
        "realised sparsity": sparsity,
    }
    columns = [f"prefill of {split} tok/s", "decode tok/s", "decode vs dense", "generate tok/s", "weights MiB"]
    table = Table("model", *columns, "skipped")
    for name in models:
        skipped = ", ".join(f"{role} {value:.0%}" for role, value in sparsity.get(name, {}).items())
        ratios = [ours / dense for ours, dense in zip(decode[name], decode["dense"], strict=True)]
        table.add_row(
            name,
            _spread(prefill[name]),
            _spread(decode[name]),
            _spread(ratios),
            _spread(generate[name]) if generate else "",
            f"{memory[name] / 2**20:.0f}",
            skipped,
        )
    Console(width=180).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def _steps(loop: DecodeLoop, ids: torch.Tensor, past: int) -> None:
    for position in range(past, ids.shape[1]):
        loop(ids[:, position : position + 1], position)


def _measure_generate(
    models: dict[str, Any], prompt: torch.Tensor, device: torch.device, arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Tokens per second of generate() without its prefill: the time of n tokens less that of one."""
    speeds: dict[str, list[float]] = {name: [] for name in models}
    count = arguments.new_tokens
    options: Any = {"do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt)
    for repeat in range(arguments.repeats + 2):
        for name, model in models.items():

            def run(tokens: int, model: Any = model) -> None:
                model.generate(prompt, min_new_tokens=tokens, max_new_tokens=tokens, **options)

            seconds = _timed(device, lambda run=run: run(count)) - _timed(device, lambda run=run: run(1))
            if repeat >= 2:
                speeds[name].append((count - 1) / seconds)
    return speeds


def _timed(device: torch.device, run: Any) -> float:
    _synchronize(device)
    started = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> float:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else float("nan")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} [{min(values):.4g}, {max(values):.4g}]"


if __name__ == "__main__":
    main()
