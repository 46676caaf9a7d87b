"""Time and memory of a calibration in PyTorch, against the reference implementation's way, in one run.

The reference's way, written down plainly here: the whole calibration set goes through the model as one batch; in front
of each layer all activations are kept, converted to float64 and sorted for the quantile, then pruned. Ours streams.

Random weights and tokens of a Llama's shape will do for time and memory; a folder of a real model is taken too.
Prints a table, writes JSON with --json.
"""

import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from random_models import SHAPES, random_llama
from scaffold import new_parser, write
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_scap import SCAPConfig, sparsify_activations
from optimum_scap.torch.backend import pruned_layers


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--model", type=Path, help="folder of a causal language model; by default random weights")
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b", help="shape of the random model")
    parser.add_argument("--scap", default="up=0.35,gate=0.35,down=0.55")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2, help="of ours; the last one's thresholds are compared")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()

    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    config = SCAPConfig.from_spec(arguments.scap, num_samples=arguments.num_samples, seq_len=arguments.seq_len)
    generator = torch.Generator().manual_seed(0)

    def new_model() -> nn.Module:
        if arguments.model is not None:
            return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(device)
        return random_llama(arguments.shape, device, dtype)

    model = new_model()
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (arguments.num_samples, arguments.seq_len), generator=generator)
    samples = [{"input_ids": row[None]} for row in ids]
    forward = _measure(device, lambda: _forward(model, samples[0]["input_ids"].to(device)))
    runs = []
    for repeat in range(arguments.repeats):
        if repeat:
            del model
            gc.collect()
            model = new_model()
        runs.append(_measure(device, lambda model=model: sparsify_activations(model, config, samples)))
    thresholds = {path: module.scap_threshold for path, module in pruned_layers(model).items()}
    del model
    gc.collect()
    model = new_model()
    misses: dict[str, float] = {}
    reference = _measure(
        device, lambda: _calibrate_like_the_reference(model, config, ids.to(device), thresholds, misses)
    )
    result: dict[str, Any] = {
        "device": device.type,
        "model": str(arguments.model.name) if arguments.model else f"{arguments.shape}, random weights",
        "dtype": arguments.dtype,
        "calibration": f"{arguments.num_samples} x {arguments.seq_len} tokens, {arguments.scap}",
        "dense forward of one sample, peak MiB beyond the model": forward[1],
        "ours, seconds": [seconds for seconds, _ in runs],
        "ours, peak MiB beyond model and dense forward": [peak - forward[1] for _, peak in runs],
        "reference's way, seconds": reference[0],
        "reference's way, peak MiB beyond model and dense forward": reference[1] - forward[1],
        "sparsity of our thresholds on the reference's activations, largest miss": max(misses.values()),
        "the same, median": statistics.median(misses.values()),
    }
    for name, value in result.items():
        print(f"{name}: {value}")
    write(arguments.json, result, gpu=device.type == "cuda")


@torch.no_grad()
def _forward(model: Any, ids: torch.Tensor) -> None:
    model(ids, use_cache=False, logits_to_keep=1)


@torch.no_grad()
def _calibrate_like_the_reference(
    model: Any, config: SCAPConfig, ids: torch.Tensor, ours: dict[str, float], misses: dict[str, float]
) -> None:
    def calibrate(path: str, target: float) -> Any:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            x = inputs[0]
            kept = x.abs().to(torch.float64).flatten().sort().values
            threshold = kept[min(kept.numel() - 1, int(target * kept.numel()))].float()
            ours_prune = torch.searchsorted(kept, torch.tensor(ours[path], device=x.device).double(), right=True)
            misses[path] = abs(float(ours_prune) / kept.numel() - target)
            return (torch.where(x.float().abs() <= threshold, 0, x),)

        return hook

    modules = dict(model.named_modules())
    for path in ours:
        role = path.rsplit(".", 1)[-1].removesuffix("_proj")
        modules[path].register_forward_pre_hook(calibrate(path, config.targets[role].sparsity))
    _forward(model, ids)


def _measure(device: torch.device, run: Any) -> tuple[float, float]:
    """(seconds, peak memory in MiB beyond what was allocated before; only the first on a CPU)."""
    gc.collect()
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started, float("nan")
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started, (torch.cuda.max_memory_allocated() - before) / 2**20


if __name__ == "__main__":
    main()
