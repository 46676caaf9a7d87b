"""Perplexity and realised sparsity of SCAP at several targets, against the dense model, on held-out text.

The protocol of the table in docs/results: windows of 512 tokens, no BOS token, all tokens sparse, calibration and
evaluation texts that share no passage. Runs at f32 so that only SCAP differs; prints a table, writes JSON with --json.
"""

import argparse
import json
from pathlib import Path

from machine import describe_machine
from optimum.intel import OVModelForCausalLM
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from optimum_scap import SCAPConfig, sparsify_activations
from optimum_scap.evaluation.perplexity import perplexity, token_samples
from optimum_scap.openvino.backend import measure_sparsity, read_parameters
from optimum_scap.openvino.graph import find_fully_connected
from optimum_scap.openvino.inference import EXACT


SPECS = ("up=0.35,gate=0.35,down=0.55", "up=0.4,gate=0.4,down=0.7", "0.5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="exported dense OpenVINO folder")
    parser.add_argument("calibration", type=Path, help="text file to calibrate on")
    parser.add_argument("evaluation", type=Path, help="text file to evaluate on")
    parser.add_argument("--scap", action="append", help=f"specification; repeat for several (default {SPECS})")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=6144)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.evaluation.read_text(encoding="utf-8")
    rows = []
    for spec in (None, *(arguments.scap or SPECS)):
        model = OVModelForCausalLM.from_pretrained(arguments.model, compile=False, ov_config=dict(EXACT))
        if spec is not None:
            config = SCAPConfig.from_spec(spec, num_samples=arguments.num_samples, seq_len=arguments.seq_len)
            sparsify_activations(model, config, arguments.calibration, tokenizer=tokenizer)
        row = {
            "scap": spec or "dense",
            "perplexity": perplexity(model, tokenizer, text, max_tokens=arguments.max_tokens),
        }
        if spec is not None:
            row.update(_sparsity(model, tokenizer, text, arguments.max_tokens))
        rows.append(row)

    table = Table("SCAP", "perplexity", "of dense", "FFN weights skipped", "largest miss of a target")
    for row in rows:
        skipped, miss = row.get("weights skipped"), row.get("largest miss")
        table.add_row(
            row["scap"],
            f"{row['perplexity']:.2f}",
            f"{row['perplexity'] / rows[0]['perplexity']:.3f}x",
            "" if skipped is None else f"{skipped:.1%}",
            "" if miss is None else f"{miss:.3f}",
        )
    Console(width=120).print(table)
    if arguments.json:
        result = {"machine": describe_machine(), "tokens": arguments.max_tokens, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def _sparsity(model: OVModelForCausalLM, tokenizer: AutoTokenizer, text: str, max_tokens: int) -> dict[str, float]:
    """The fraction of the pruned layers' weights that is skipped on `text`, and the largest |realised - target|."""
    import torch

    samples = [
        model.prepare_inputs(torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.int64))
        for ids in token_samples(tokenizer, text, window=512, max_tokens=max_tokens)
    ]
    realised = measure_sparsity(model.model, samples, len(samples))
    parameters = read_parameters(model.model)
    sizes = {layer.path: layer.in_features * layer.out_features for layer in find_fully_connected(model.model)}
    skipped = sum(realised[path] * sizes[path] for path in realised) / sum(sizes[path] for path in realised)
    misses = [abs(realised[path] - layer.target_sparsity) for path, layer in parameters.layers.items()]
    return {"weights skipped": skipped, "largest miss": max(misses)}


if __name__ == "__main__":
    main()
