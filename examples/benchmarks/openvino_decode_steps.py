"""Time of single decode steps of a model, dense and SCAP, step by step in turn: differences of one percent show.

SCAP runs twice, as `OVModelForCausalLM` runs it and with stock dense layers, where that differs: what remains of the
speed-up then comes from sparsity. All read and generate the same random tokens.
"""

import json
from pathlib import Path

import numpy as np
import openvino as ov
from scaffold import new_parser, write

from optimum_scap.commands.tables import print_report
from optimum_scap.evaluation.report import Quantity
from optimum_scap.evaluation.speed import Contestant, Stepper, openvino_contestants, report_of
from optimum_scap.openvino.arithmetic import preferred_precision
from optimum_scap.openvino.fuse import fuse


def compile_contestant(contestant: Contestant) -> Stepper:
    """The model in its folder, with its sparse layers fused if it is to be fast."""
    model = ov.Core().read_model(contestant.folder / "openvino_model.xml")
    if contestant.fast:
        report = fuse(model, precision=preferred_precision(), dense_layers=contestant.dense_layers)
        print(f"{len(report.fused)} sparse and {len(report.dense)} dense layers fused")
    return Stepper(ov.Core().compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"}))


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("dense", type=Path)
    parser.add_argument("sparse", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3, help="times that all models are compiled anew")
    arguments = parser.parse_args()
    contestants = openvino_contestants(arguments.sparse, arguments.dense, portable=False)
    vocabulary = json.loads((arguments.dense / "config.json").read_text())["vocab_size"]
    prompt = arguments.prompt_tokens
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, prompt + arguments.steps))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(arguments.repeats):
        steppers = {name: compile_contestant(contestant) for name, contestant in contestants.items()}
        for step in steppers.values():
            step(ids[:, :prompt], 0)
        for past in range(prompt, prompt + arguments.steps):
            first = past % len(contestants)
            for name in [*contestants][first:] + [*contestants][:first]:
                seconds[name].append(steppers[name](ids[:, past : past + 1], past))
    speeds = {name: tuple(1 / value for value in values) for name, values in seconds.items()}
    settings = {"prompt_tokens": prompt, "steps": arguments.steps, "repeats": arguments.repeats}
    steps = Quantity(name="decode, step by step", unit="tokens/s", values=speeds, quartiles=True)
    report = report_of(contestants, [steps], {}, settings)
    print_report(report)
    write(arguments.json, report)


if __name__ == "__main__":
    main()
