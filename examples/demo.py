"""The main job on a real model: one optimum-cli command, then what it cost in quality and what it skips.

Run by `make demo`. Writes to demo-output/ (or the folder given), which a second run uses again.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from demo_data import write_prose, write_smollm2
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

console = Console(width=110)


def run(*command: str | Path) -> None:
    console.print(f"$ {' '.join(map(str, command))}", style="bold", soft_wrap=True, highlight=False)
    script = Path(sys.executable).with_name(str(command[0]))
    result = subprocess.run([str(script), *map(str, command[1:])], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if result.returncode != 0:
        raise SystemExit(result.stderr.decode())


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
    output = parser.parse_args().output
    started = time.monotonic()
    quiet_offline_guess()  # make runs offline
    model_folder = write_smollm2(output / "smollm2-135m")
    calibration, evaluation = write_prose(output)
    dense_folder, sparse_folder = output / "smollm2-int8", output / "smollm2-int8-scap"

    console.rule("1. Dense: INT8 weights")
    if not (dense_folder / "openvino_model.xml").exists():
        shutil.rmtree(dense_folder, ignore_errors=True)
        run(
            *("optimum-cli", "export", "openvino", "-m", model_folder, "--task", "text-generation-with-past"),
            *("--weight-format", "int8", dense_folder),
        )
    console.rule("2. Sparse: INT8 weights and SCAP, one command")
    run(
        *("optimum-cli", "export", "openvino", "-m", model_folder, "--weight-format", "int8"),
        *("--scap", SPEC, "--scap-dataset", calibration, "--scap-num-samples", "32", sparse_folder),
    )

    console.rule("3. What it costs and what it skips, on prose that calibration has not seen")
    text = evaluation.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(dense_folder)
    models = {
        "dense INT8": OVModelForCausalLM.from_pretrained(dense_folder),
        "INT8 + SCAP": OVModelForCausalLM.from_pretrained(sparse_folder),
    }
    perplexities = {
        name: (perplexity(model, tokenizer, text, max_tokens=EVALUATION_TOKENS),) for name, model in models.items()
    }
    quality = Report(
        machine=describe_machine(),
        settings={"evaluation_tokens": EVALUATION_TOKENS},
        contestants={"dense INT8": dense_folder.name, "INT8 + SCAP": sparse_folder.name},
        baseline="dense INT8",
        quantities=(Quantity(name="perplexity (lower is better)", values=perplexities),),
        sparsity={"INT8 + SCAP": measured_sparsity(models["INT8 + SCAP"], tokenizer, text)},
    )
    print_report(quality, targets=True)
    (output / "quality.json").write_text(quality.to_json(), encoding="utf-8")
    console.print(
        "SmolLM2-135M is far more fragile than the 7B models SCAP is made for: what you see here is the hard case.\n"
    )
    for name, model in models.items():
        console.print(f"[bold]{name}:[/bold] {generated(model, tokenizer)}\n")
    console.rule("4. How fast: the same folder with the C++ operations")
    script = Path(sys.executable).with_name("optimum-cli")
    benchmark = [
        script,
        "scap",
        "benchmark",
        sparse_folder,
        "--baseline",
        dense_folder,
        "--json",
        output / "speed.json",
    ]
    if subprocess.run([str(part) for part in benchmark]).returncode != 0:
        raise SystemExit("optimum-cli scap benchmark failed")
    console.print(f"Sparse model: {sparse_folder}  (dense: {dense_folder})")
    console.print(f"Took {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
