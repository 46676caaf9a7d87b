"""The main job on a real model: one optimum-cli command, then what it cost in quality and what it skips.

Run by `make demo`, with SmolLM2-135M; `make demo-1.5b` does the same with Qwen2.5-Coder-1.5B. Writes to demo-output/
(or the folder given), which a second run uses again.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from demo_data import write_prose, write_qwen, write_smollm2
from optimum.intel import OVModelForCausalLM
from rich.console import Console
from transformers import AutoTokenizer

from optimum_scap.commands.tables import print_report
from optimum_scap.evaluation.machine import describe_machine
from optimum_scap.evaluation.perplexity import perplexity, token_samples
from optimum_scap.evaluation.report import Quantity, Report
from optimum_scap.evaluation.sparsity import RealizedSparsity, realized_by_openvino
from optimum_scap.openvino.optimum_intel import quiet_offline_guess


SPEC = "up=0.35,gate=0.35,down=0.55"
PROMPT = "The water cycle describes how"
EVALUATION_TOKENS = 4096
SMALL_MODEL = (
    "SmolLM2-135M is far more fragile than the 7B models SCAP is made for: what you see here is the hard case.\n"
)

console = Console(width=110)


def run(*command: str | Path) -> None:
    console.print(f"$ {' '.join(map(str, command))}", style="bold", soft_wrap=True, highlight=False)
    script = Path(sys.executable).with_name(str(command[0]))
    result = subprocess.run([str(script), *map(str, command[1:])], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if result.returncode != 0:
        raise SystemExit(result.stderr.decode())


def shown(*command: str | Path) -> None:
    """Runs a command whose output is part of the demo."""
    if subprocess.run([str(part) for part in command]).returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed")


def generated(model: OVModelForCausalLM, tokenizer: AutoTokenizer) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.1)
    return tokenizer.decode(tokens[0], skip_special_tokens=True).replace("\n", " ")


def measured_sparsity(model: OVModelForCausalLM, tokenizer: AutoTokenizer, text: str) -> RealizedSparsity:
    """What `model` skips on `text`."""
    import torch

    samples = [
        model.prepare_inputs(torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.int64))
        for ids in token_samples(tokenizer, text, window=256, max_tokens=2048)
    ]
    return realized_by_openvino(model.model, samples, len(samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", default=Path("demo-output"))
    parser.add_argument("--qwen", action="store_true", help="the 1.5B model, in INT4")
    arguments = parser.parse_args()
    output = arguments.output
    started = time.monotonic()
    quiet_offline_guess()  # make runs offline
    name, bits = ("qwen2.5-coder-1.5b", 4) if arguments.qwen else ("smollm2-135m", 8)
    model_folder = (write_qwen if arguments.qwen else write_smollm2)(output / name)
    calibration, evaluation = write_prose(output)
    dense_folder, sparse_folder = output / f"{name}-int{bits}", output / f"{name}-int{bits}-scap"
    weights = ("--weight-format", f"int{bits}", *(("--group-size", "128") if bits == 4 else ()))
    dense, sparse = f"dense INT{bits}", f"INT{bits} + SCAP"

    console.rule(f"1. Dense: INT{bits} weights")
    if not (dense_folder / "openvino_model.xml").exists():
        shutil.rmtree(dense_folder, ignore_errors=True)
        run(
            *("optimum-cli", "export", "openvino", "-m", model_folder, "--task", "text-generation-with-past"),
            *(*weights, dense_folder),
        )
    console.rule(f"2. Sparse: INT{bits} weights and SCAP, one command")
    run(
        *("optimum-cli", "export", "openvino", "-m", model_folder, *weights),
        *("--scap", SPEC, "--scap-dataset", calibration, "--scap-num-samples", "32", sparse_folder),
    )

    console.rule("3. What it costs and what it skips, on prose that calibration has not seen")
    text = evaluation.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(dense_folder)
    models = {
        dense: OVModelForCausalLM.from_pretrained(dense_folder),
        sparse: OVModelForCausalLM.from_pretrained(sparse_folder),
    }
    perplexities = {
        name: (perplexity(model, tokenizer, text, max_tokens=EVALUATION_TOKENS),) for name, model in models.items()
    }
    quality = Report(
        machine=describe_machine(),
        settings={"evaluation_tokens": EVALUATION_TOKENS},
        contestants={dense: dense_folder.name, sparse: sparse_folder.name},
        baseline=dense,
        quantities=(Quantity(name="perplexity (lower is better)", values=perplexities),),
        sparsity={sparse: measured_sparsity(models[sparse], tokenizer, text)},
    )
    print_report(quality, targets=True)
    (output / "quality.json").write_text(quality.to_json(), encoding="utf-8")
    console.print("" if arguments.qwen else SMALL_MODEL)
    for contestant, model in models.items():
        console.print(f"[bold]{contestant}:[/bold] {generated(model, tokenizer)}\n")
    models.clear()
    console.rule("4. How fast: the same folder with the C++ operations")
    script = Path(sys.executable).with_name("optimum-cli")
    shown(script, "scap", "benchmark", sparse_folder, "--baseline", dense_folder, "--json", output / "speed.json")
    console.rule("5. What larger models would get: one FFN of each on this machine, half of its inputs pruned")
    shown(sys.executable, Path(__file__).with_name("benchmarks") / "openvino_ffn.py", "--json", output / "ffn.json")
    console.print(f"Sparse model: {sparse_folder}  (dense: {dense_folder})")
    console.print(f"Took {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
