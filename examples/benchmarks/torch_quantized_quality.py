"""Perplexity of SCAP on float, INT8 and INT4 weights of one PyTorch model: does pruning cost more on coarse weights?

    python examples/benchmarks/torch_quantized_quality.py MODEL CALIBRATION EVALUATION --group-size 64 --json out.json

Windows of 512 tokens, no BOS token, all tokens sparse; thresholds are calibrated on the weights that run. The last
column is the loss by SCAP, in log perplexity, by that of the float model.
"""

import math

import torch
from rich.console import Console
from rich.table import Table
from scaffold import add_texts, new_parser, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_scap import SCAPConfig, sparsify_activations
from optimum_scap.evaluation.perplexity import perplexity
from optimum_scap.torch.quantize import quantize_weights


WEIGHTS = ("float", "int8", "int4")


def main() -> None:
    parser = new_parser(__doc__)
    add_texts(parser, "folder of a float model of transformers", "up=0.35,gate=0.35,down=0.55")
    parser.add_argument("--group-size", type=int, default=64, help="input channels that share a scale of INT4")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.evaluation.read_text(encoding="utf-8")
    config = SCAPConfig.from_spec(arguments.scap, num_samples=arguments.num_samples, seq_len=arguments.seq_len)
    figures: dict[str, dict[str, float]] = {}
    for weights in arguments.weights:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        if weights != "float":
            quantize_weights(model, weights, arguments.group_size if weights == "int4" else None)
        dense = perplexity(model, tokenizer, text, max_tokens=arguments.max_tokens)
        sparsify_activations(model, config, arguments.calibration, tokenizer=tokenizer)
        sparse = perplexity(model, tokenizer, text, max_tokens=arguments.max_tokens)
        figures[weights] = {"dense": dense, "SCAP": sparse, "loss": math.log(sparse / dense)}
        if "float" in figures:
            figures[weights]["loss by that on floats"] = figures[weights]["loss"] / figures["float"]["loss"]

    table = Table(
        "weights", "dense", "SCAP", "change", "loss by that on floats", title=f"Perplexity, {arguments.scap}"
    )
    for weights, found in figures.items():
        change = f"{100 * (found['SCAP'] / found['dense'] - 1):+.1f} %"
        relative = found.get("loss by that on floats", math.nan)
        values = (f"{found['dense']:.2f}", f"{found['SCAP']:.2f}", change, f"{relative:.2f}")
        table.add_row(weights, *values)
    Console().print(table)
    names = ("scap", "num_samples", "seq_len", "max_tokens", "group_size")
    settings = {name: getattr(arguments, name) for name in names}
    write(arguments.json, {"settings": settings, "model": arguments.model.name, "perplexity": figures})


if __name__ == "__main__":
    main()
