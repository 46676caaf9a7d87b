"""Time of single decode steps of a model, dense and SCAP, step by step in turn: differences of one percent show.

SCAP runs twice: with the C++ operation for its sparse layers only, and for dense layers of 4-bit weights too, as
`OVModelForCausalLM` runs it. All read and generate the same random tokens.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import openvino as ov
from machine import describe_machine

from optimum_scap.evaluation.speed import Stepper
from optimum_scap.openvino.extension.build import build_extension
from optimum_scap.openvino.fuse import fuse
from optimum_scap.openvino.modeling import preferred_precision


def compile_variant(folder: Path, dense_int4: bool | None) -> Stepper:
    """The model of `folder`, with its sparse layers fused unless `dense_int4` is None."""
    model = ov.Core().read_model(folder / "openvino_model.xml")
    if dense_int4 is not None:
        report = fuse(model, precision=preferred_precision(), dense_int4=dense_int4)
        print(f"{len(report.fused)} sparse and {len(report.dense)} dense layers fused")
    return Stepper(ov.Core().compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense", type=Path)
    parser.add_argument("sparse", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3, help="times that all models are compiled anew")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    build_extension()
    variants = {"dense": (arguments.dense, None)}
    variants |= {"SCAP, sparse layers": (arguments.sparse, False), "SCAP": (arguments.sparse, True)}
    vocabulary = json.loads((arguments.dense / "config.json").read_text())["vocab_size"]
    prompt = arguments.prompt_tokens
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, prompt + arguments.steps))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.repeats):
        steppers = {name: compile_variant(*variant) for name, variant in variants.items()}
        for step in steppers.values():
            step(ids[:, :prompt], 0)
        for past in range(prompt, prompt + arguments.steps):
            first = past % len(variants)
            for name in [*variants][first:] + [*variants][:first]:
                seconds[name].append(steppers[name](ids[:, past : past + 1], past))
    for name, values in seconds.items():
        ratios = np.divide(seconds["dense"], values)
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        print(f"{name}: {np.median(values) * 1e3:.2f} ms, {middle:.3f}x [{low:.3f}, {high:.3f}] of dense")
    if arguments.json:
        document = {"machine": describe_machine(), "seconds per step": seconds}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
