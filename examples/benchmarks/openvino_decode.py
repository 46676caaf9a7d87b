"""Decode and prefill speed of a whole model, dense against SCAP, side by side in one run.

Without --model it makes a Llama-shaped model of about 1.1B parameters with random weights: speed does not depend on
what the weights are, and thresholds are calibrated, so the sparsity is real. Prints a table per weight format, writes
JSON with --json.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
from scaffold import new_parser, write

from optimum_scap.commands.tables import print_report
from optimum_scap.evaluation.speed import SCAP, measure, openvino_contestants, realized_sparsity, report_of


LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
PROMPT_TOKENS = (128, 2, 4, 8, 16, 64, 256, 512, 1024)  # decoding starts behind the first
FORMATS = {"int8": ["--weight-format", "int8"], "int4": ["--weight-format", "int4", "--group-size", "128"]}


def random_llama(folder: Path) -> Path:
    """A Llama-shaped model with random weights and the tokenizer of the demo's model; made once."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if (folder / "tokenizer.json").exists():
        return folder
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from demo_data import write_smollm2

    tokenizer = AutoTokenizer.from_pretrained(write_smollm2(folder.parent / "smollm2"))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **LLAMA_1B)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(*command: object) -> None:
    script = str(Path(sys.executable).with_name("optimum-cli"))
    result = subprocess.run([script, *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        raise SystemExit(result.stderr)


def calibration_text(path: Path) -> Path:
    """Random words: for a model with random weights any tokens will do."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(4000)]
    path.write_text(" ".join(words), encoding="utf-8")
    return path


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("work", type=Path, help="folder for models; what is there is used again")
    parser.add_argument("--model", type=Path, help="Hugging Face model folder instead of a random one")
    parser.add_argument("--dataset", type=Path, help="text file to calibrate on, with --model")
    parser.add_argument("--scap", default="0.5")
    parser.add_argument("--weight-format", action="append", choices=FORMATS, help="repeat for several (default: both)")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=PROMPT_TOKENS)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = arguments.model or random_llama(arguments.work / "llama-1b")
    dataset = arguments.dataset or calibration_text(arguments.work / "words.txt")
    results = {}
    for name in arguments.weight_format or FORMATS:
        dense, sparse = (arguments.work / f"{model.name}-{name}-{kind}" for kind in ("dense", "scap"))
        if not dense.exists():
            run("export", "openvino", "-m", model, "--task", "text-generation-with-past", *FORMATS[name], dense)
        if not sparse.exists():
            calibration = ["--scap-dataset", dataset, "--scap-num-samples", 4, "--scap-seq-len", 128]
            run("scap", "apply", dense, sparse, "--scap", arguments.scap, *calibration)
        contestants = openvino_contestants(sparse, dense, portable=False)
        settings = {"prompt_tokens": arguments.prompt_tokens, "repeats": arguments.repeats}
        quantities = measure(contestants, **settings)
        report = report_of(contestants, quantities, {SCAP: realized_sparsity(sparse)}, settings)
        print(f"{model.name}, {name}, {arguments.scap}")
        print_report(report)
        results[name] = report.model_dump(mode="json")
    write(arguments.json, {"scap": arguments.scap, "results": results})


if __name__ == "__main__":
    main()
