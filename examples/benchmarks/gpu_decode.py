"""Tokens per second of a 7B-shaped model on the GPU, dense and sparse in one run.

Random weights; thresholds are calibrated, so that the sparsity is real, and what is realized on the measured tokens is
printed. All models take turns in one process. The loop is a static cache and one step of one token, compiled as a CUDA
graph; `--generate` measures transformers' own `generate(cache_implementation="static")` too, dense and SCAP's first
specification.

A sparse model also runs q, k and v of attention in one launch, whether they are pruned or not, and attention that it
leaves dense through a kernel of ours. What is left of the speed-up with stock dense layers is a column of its own, and
so is what those kernels give by themselves: a dense model with nothing else.

`--weights int4|int8` has all of them, but for one dense model, hold integer weights. Ratios are then of the best dense
model with these weights that torch has by itself: its INT4 kernel (tinygemm, groups of 128, bfloat16), or for INT8 one
scale per output channel and a kernel of torch.compile. A dense model on the kernels of SCAP runs beside it.

`--cats` adds CATS, on the Triton kernels of its authors, at the sparsity that costs as much quality as SCAP's first
specification; `--reference` adds the reference's method, threshold masks and one of those kernels in float32 without
compilation, beside the dense model run in the same way.
"""

import argparse
import dataclasses
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from gpu_baselines import CatsKernels, install_cats, install_reference, load_cats, pruned_fractions
from random_models import SHAPES, random_llama
from random_quantized import TINYGEMM_GROUP, Quantization, quantize, quantize_by_torch
from scaffold import new_parser, write
from torch import nn

from optimum_scap import SCAPConfig, sparsify_activations
from optimum_scap.commands.tables import print_report
from optimum_scap.core.parameters import LayerParameters
from optimum_scap.evaluation.machine import describe_machine
from optimum_scap.evaluation.report import Quantity, Report
from optimum_scap.evaluation.sparsity import RealizedSparsity, realized_by_torch
from optimum_scap.evaluation.torch_speed import DecodeLoop, weight_bytes
from optimum_scap.torch.backend import read_parameters
from optimum_scap.torch.blocks import has_replaced_dense_layers, run_dense_layers_together


SPECS = {
    "FFN 35/55 %": "up=0.35,gate=0.35,down=0.55",
    "all FC 50 %": "q=0.5,k=0.5,v=0.5,o=0.5,up=0.5,gate=0.5,down=0.5",
}
WARM_UP = 2  # compiling and recording, then a run of what was recorded
PREFILLS = 5  # per repeat: they are short, and compared within a few percent
REFERENCE_REPEATS = 2
DENSE, ATTENTION, CATS = "dense", "dense, attention as in SCAP", "CATS, attention as in SCAP"
QUANTIZED = {"int4": Quantization(4, TINYGEMM_GROUP), "int8": Quantization(8, None)}
LIBRARY, OURS = "dense, weights by torch", "dense, weights by SCAP"
DENSE_FLOAT32, REFERENCE = "dense, float32, not compiled", "reference's method, float32, not compiled"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--weights", choices=("dense", *QUANTIZED), default="dense")
    parser.add_argument("--dtype", help="of activations (default: float16, bfloat16 with integer weights)")
    parser.add_argument("--scap", action="append", help="specification; repeat for several")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--generate",
        action="store_true",
        help="measure transformers' generate() as well: of dense and of the first specification",
    )
    parser.add_argument("--eager", action="store_true", help="do not compile the step (a trial on a CPU)")
    parser.add_argument("--cats", type=Path, help="checkout of github.com/ScalingIntelligence/CATS to compare with")
    parser.add_argument(
        "--cats-sparsity",
        type=float,
        default=0.377,
        help="fraction of the neurons that CATS prunes (default: %(default)s, which skips 25.1 %% of the FFN weights, "
        "gate being read whole. At the perplexity of SCAP with up=0.35,gate=0.35,down=0.55 CATS may skip as much, by "
        "docs/results/cats-quality-smollm2-f32.json, measured on SmolLM2-135M)",
    )
    parser.add_argument("--reference", action="store_true", help="measure the reference's method too (needs --cats)")
    arguments = parser.parse_args()
    if arguments.reference and arguments.cats is None:
        parser.error("--reference runs on the kernels of CATS: say where they are with --cats")
    if arguments.cats and arguments.weights != "dense":
        parser.error("--cats needs --weights dense: the kernels of CATS read float16")
    if arguments.dtype is None:
        arguments.dtype = "float16" if arguments.weights == "dense" else "bfloat16"

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = load_cats(arguments.cats) if arguments.cats else None
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(32000, (1, arguments.prompt_tokens + arguments.new_tokens), generator=generator).to(device)
    # as long as what is measured: over random tokens the output of attention shrinks with their number
    calibration = [{"input_ids": torch.randint(32000, (1, ids.shape[1]), generator=generator)} for _ in range(4)]
    specs = {spec: spec for spec in arguments.scap} if arguments.scap else SPECS
    ours = next(iter(specs))
    report, thresholds = _measure_models(specs, kernels, calibration, ids, arguments)
    print_report(report)
    result: dict[str, Any] = {"report": report.model_dump(mode="json")}
    if arguments.weights != "dense":
        decode = report.quantity("decode")
        ratios = {name: decode.ratio(name, DENSE) for name in (LIBRARY, OURS, *specs)}
        for name, ratio in ratios.items():
            print(f"{name}: {ratio} of {DENSE}, {arguments.dtype}")
        result["decode of dense"] = {name: dataclasses.asdict(ratio) for name, ratio in ratios.items() if ratio}
    if kernels:
        result["at equal quality"] = _compare_at_equal_quality(report, ours, arguments.cats_sparsity)
    gpu = device.type == "cuda"
    write(arguments.json, result, gpu=gpu)  # in case that what follows is cut off
    if arguments.reference:
        _release()
        reference = _measure_reference(kernels, thresholds[ours], ids, arguments)
        print_report(reference)
        speeds = report.quantity("decode").values[ours], reference.quantity("decode").values[REFERENCE]
        ratio = statistics.median(speeds[0]) / statistics.median(speeds[1])
        result["reference"] = reference.model_dump(mode="json")
        result["SCAP over the reference's method"] = ratio
        print(f"SCAP, {ours}, decodes {ratio:.2f} times as fast as the reference's method")
        write(arguments.json, result, gpu=gpu)


def _measure_models(
    specs: dict[str, str],
    kernels: CatsKernels | None,
    calibration: list[dict[str, torch.Tensor]],
    ids: torch.Tensor,
    arguments: argparse.Namespace,
) -> tuple[Report, dict[str, dict[str, LayerParameters]]]:
    """The report; and what was calibrated, by name of the specification and path of the layer."""
    device, dtype = ids.device, getattr(torch, arguments.dtype)
    sparsity: dict[str, RealizedSparsity] = {}
    models: dict[str, Any] = {}
    thresholds: dict[str, dict[str, LayerParameters]] = {}
    quantization = QUANTIZED.get(arguments.weights)
    others = [ATTENTION] if quantization is None else [LIBRARY, OURS]
    for name in (DENSE, *others, *specs, *([CATS] if kernels else [])):
        model = random_llama(arguments.shape, device, dtype)
        if name == LIBRARY:
            assert quantization is not None
            quantize_by_torch(model, quantization)
        elif quantization is not None and name != DENSE:
            quantize(model, quantization)
        if name in (ATTENTION, CATS):
            for block in model.model.layers:
                run_dense_layers_together(block.self_attn)
        if name in specs:
            sparsify_activations(model, SCAPConfig.from_spec(specs[name]), calibration)
            sparsity[name] = realized_by_torch(model, [{"input_ids": ids}])
            parameters = read_parameters(model)
            assert parameters is not None
            thresholds[name] = parameters.layers
            if quantization is None and has_replaced_dense_layers(model):
                twin = models[f"{name}, dense layers stock"] = random_llama(arguments.shape, device, dtype)
                sparsify_activations(twin, parameters.model_copy(update={"dense_layers": "stock"}))
                _share_weights(model, twin)
        elif kernels and name == CATS:
            samples = torch.cat([sample["input_ids"] for sample in calibration]).to(device)
            install_cats(model, kernels, arguments.cats_sparsity, samples)
            sparsity[name] = pruned_fractions(model, ids)
        models[name] = model
    if quantization is not None:
        _check_same_weights(models[LIBRARY], models[OURS], ids)
    quantities = _take_turns(models, ids, arguments.prompt_tokens, arguments.repeats, not arguments.eager)
    if arguments.generate:
        chosen = {name: models[name] for name in (DENSE, next(iter(specs)))}
        quantities.append(_row("generate", "tokens/s", _measure_generate(chosen, ids[:, :32], device, arguments)))
    baseline = DENSE if quantization is None else LIBRARY
    return _report(models, quantities, sparsity, baseline, arguments), thresholds


@torch.no_grad()
def _check_same_weights(model: Any, twin: Any, ids: torch.Tensor) -> None:
    """Raises SystemExit if two models do not compute the same but for the rounding of 16 bits."""
    logits, others = (each(ids, logits_to_keep=1).logits.float() for each in (model, twin))
    if not (logits - others).norm() < 0.1 * logits.norm():
        raise SystemExit(f"{LIBRARY} and {OURS} do not compute the same")


def _share_weights(model: nn.Module, twin: nn.Module) -> None:
    """Has `twin` read the weights of `model`, which has the same in the same order: one copy in memory."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(twin.get_submodule(path), name, parameter)


def _measure_reference(
    kernels: Any, thresholds: dict[str, LayerParameters], ids: torch.Tensor, arguments: argparse.Namespace
) -> Report:
    models: dict[str, Any] = {}
    for name in (DENSE_FLOAT32, REFERENCE):
        models[name] = random_llama(arguments.shape, ids.device, torch.float32)
    install_reference(models[REFERENCE], kernels, thresholds)
    sparsity = {REFERENCE: pruned_fractions(models[REFERENCE], ids)}
    quantities = _take_turns(models, ids, arguments.prompt_tokens, REFERENCE_REPEATS, compiled=False)
    return _report(models, quantities, sparsity, DENSE_FLOAT32, arguments)


def _report(
    models: dict[str, Any],
    quantities: list[Quantity],
    sparsity: dict[str, RealizedSparsity],
    baseline: str,
    arguments: argparse.Namespace,
) -> Report:
    weights = {name: [weight_bytes(model) / 2**20] for name, model in models.items()}
    names = ("prompt_tokens", "new_tokens", "repeats", "eager")
    return Report(
        machine=describe_machine(gpu=torch.cuda.is_available()),
        settings={name: getattr(arguments, name) for name in names},
        contestants={name: f"{arguments.shape}, random weights, {_kind(name, arguments)}" for name in models},
        baseline=baseline,
        quantities=(*quantities, _row("weights", "MiB", weights)),
        sparsity=sparsity,
    )


def _kind(name: str, arguments: argparse.Namespace) -> str:
    dense = name in (DENSE, DENSE_FLOAT32) or arguments.weights == "dense"
    return arguments.dtype if dense else f"{arguments.weights}, {arguments.dtype}"


def _row(name: str, unit: str, values: dict[str, list[float]]) -> Quantity:
    return Quantity(name=name, unit=unit, values={key: tuple(found) for key, found in values.items()})


def _take_turns(models: dict[str, Any], ids: torch.Tensor, split: int, repeats: int, compiled: bool) -> list[Quantity]:
    """The speeds of `models`: prefill of `split` tokens of `ids` [1, tokens], then the others one by one."""
    device = ids.device
    loops = {name: DecodeLoop(model, ids.shape[1], compiled) for name, model in models.items()}
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(WARM_UP + repeats):
        for _ in range(PREFILLS):
            for name, loop in loops.items():
                seconds = _timed(device, lambda loop=loop: loop(ids[:, :split], 0))
                if repeat >= WARM_UP:
                    prefill[name].append(split / seconds)
        for name, loop in loops.items():  # each goes on behind the prompt in its cache
            seconds = _timed(device, lambda loop=loop: _steps(loop, ids, split))
            if repeat >= WARM_UP:
                decode[name].append((ids.shape[1] - split) / seconds)
    return [_row("decode", "tokens/s", decode), _row(f"prefill of {split} tokens", "tokens/s", prefill)]


def _compare_at_equal_quality(report: Report, ours: str, cats_sparsity: float) -> dict[str, Any]:
    """The speed-ups of SCAP and CATS over the dense model with the same attention; prints them."""
    decode = report.quantity("decode")
    ratios = {name: decode.ratio(name, ATTENTION) for name in (ours, CATS)}
    speedup = {name: ratio.median for name, ratio in ratios.items() if ratio is not None}
    # None where CATS gains nothing that could be divided by
    ratio = (speedup[ours] - 1) / (speedup[CATS] - 1) if speedup[CATS] > 1 else None
    print(f"SCAP, {ours}: {speedup[ours]:.3f}x of {ATTENTION}; CATS, {cats_sparsity:.1%}: {speedup[CATS]:.3f}x")
    print(f"additional speed-up: SCAP's is {ratio:.2f} times CATS's" if ratio else "CATS is no faster than dense")
    return {
        "SCAP": ours,
        "SCAP decode vs dense with the same attention": speedup[ours],
        "CATS sparsity wanted": cats_sparsity,
        "CATS decode vs dense with the same attention": speedup[CATS],
        "additional speed-up, SCAP over CATS": ratio,
    }


def _release() -> None:
    """Frees the models that were measured, and the graphs that were recorded of them."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    for repeat in range(WARM_UP + arguments.repeats):
        for name, model in models.items():

            def run(tokens: int, model: Any = model) -> None:
                model.generate(prompt, min_new_tokens=tokens, max_new_tokens=tokens, **options)

            seconds = _timed(device, lambda run=run: run(count)) - _timed(device, lambda run=run: run(1))
            if repeat >= WARM_UP:
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


if __name__ == "__main__":
    main()
