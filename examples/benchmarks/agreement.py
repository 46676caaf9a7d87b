"""How far two correct executions of one model differ, in f32: rounding, and what sparsity makes of it.

For a dense and a SCAP folder: the relative difference of the logits between reading a text at once and token by token,
with stock optimum-intel. For the SCAP folder: behind how many of a number of prompts two executions generate the same
tokens greedily, and its perplexity with OpenVINO's operations and with the C++ ones.
"""

from pathlib import Path
from typing import Any

import numpy as np
import optimum.intel
import torch
from scaffold import new_parser, write
from transformers import AutoTokenizer

import optimum_scap
from optimum_scap.evaluation.perplexity import perplexity
from optimum_scap.openvino.inference import EXACT


def step_by_step(model: Any, ids: torch.Tensor) -> np.ndarray:
    logits, past = [], None
    for index in range(ids.shape[1]):
        mask = torch.ones((1, index + 1), dtype=torch.int64)
        output = model(input_ids=ids[:, index : index + 1], attention_mask=mask, past_key_values=past)
        past = output.past_key_values
        logits.append(output.logits[0, -1].numpy().copy())
    return np.array(logits)


def differences(folder: Path, text: str, tokens: int) -> list[float]:
    """Relative L2 difference of the logits per token."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = optimum.intel.OVModelForCausalLM.from_pretrained(str(folder), ov_config=dict(EXACT))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :tokens]
    at_once = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].numpy().copy()
    distance = np.linalg.norm(step_by_step(model, ids) - at_once, axis=-1)
    return [float(value) for value in distance / np.linalg.norm(at_once, axis=-1)]


def continue_greedily(model: Any, ids: torch.Tensor, tokens: int, *, at_once: bool = True) -> list[int]:
    """The tokens behind a prompt `[1, n]` that is read at once or token by token."""
    chunks = [ids] if at_once else list(ids.split(1, dim=1))
    past, seen, generated = None, 0, []
    while len(generated) < tokens:
        chunk = chunks.pop(0)
        seen += chunk.shape[1]
        output = model(input_ids=chunk, attention_mask=torch.ones((1, seen), dtype=torch.int64), past_key_values=past)
        past = output.past_key_values
        if not chunks:
            generated.append(int(output.logits[0, -1].argmax()))
            chunks.append(torch.tensor([generated[-1:]]))
    return generated


def equal_continuations(folder: Path, text: str, prompts: int, tokens: int) -> dict[str, list[int]]:
    """For pairs of executions and each prompt of 16 tokens, how many of `tokens` agree until one differs."""
    ids = AutoTokenizer.from_pretrained(str(folder))(text, return_tensors="pt")["input_ids"]
    starts = np.linspace(0, ids.shape[1] - 16, prompts).astype(int)
    chosen = [ids[:, start : start + 16] for start in starts]
    runs: dict[str, list[list[int]]] = {}
    for name, package, config in (
        ("stock", optimum.intel, {}),
        ("stock, one thread", optimum.intel, {"INFERENCE_NUM_THREADS": "1"}),
        ("C++", optimum_scap, {}),
    ):
        model = package.OVModelForCausalLM.from_pretrained(str(folder), ov_config=EXACT | config)
        runs[name] = [continue_greedily(model, prompt, tokens) for prompt in chosen]
        if not config:
            by_token = [continue_greedily(model, prompt, tokens, at_once=False) for prompt in chosen]
            runs[f"{name}, prompt token by token"] = by_token

    def equal_tokens(first: str, second: str) -> list[int]:
        pairs = zip(runs[first], runs[second], strict=True)
        return [int(np.cumprod(np.equal(*pair)).sum()) for pair in pairs]

    return {
        f"{first} / {second}": equal_tokens(first, second)
        for first, second in (
            ("stock", "stock, one thread"),
            ("stock", "stock, prompt token by token"),
            ("stock", "C++"),
            ("stock, prompt token by token", "C++, prompt token by token"),
        )
    }


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("dense", type=Path)
    parser.add_argument("sparse", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=24)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    result: dict[str, Any] = {}
    for name, folder in (("dense", arguments.dense), ("scap", arguments.sparse)):
        values = differences(folder, text, arguments.tokens)
        result[name] = values
        print(f"{name}: at once against token by token, median {np.median(values):.1e}, largest {max(values):.1e}")
    result["greedy"] = equal_continuations(arguments.sparse, text, arguments.prompts, arguments.tokens)
    for name, counts in result["greedy"].items():
        equal = sum(count == arguments.tokens for count in counts)
        print(f"{name}: the same {arguments.tokens} tokens behind {equal} of {len(counts)} prompts")
    tokenizer = AutoTokenizer.from_pretrained(str(arguments.sparse))
    for package in (optimum.intel, optimum_scap):
        model = package.OVModelForCausalLM.from_pretrained(str(arguments.sparse), ov_config=dict(EXACT))
        value = perplexity(model, tokenizer, text, max_tokens=4096)
        result[f"perplexity {package.__name__}"] = value
        print(f"perplexity of SCAP with {package.__name__}: {value:.2f}")
    write(arguments.json, result)


if __name__ == "__main__":
    main()
