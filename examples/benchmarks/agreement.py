"""How far two correct executions of one model differ, in f32: rounding, and what sparsity makes of it.

For a dense and a SCAP folder: the relative difference of the logits between reading a text at once and token by token,
with stock optimum-intel; and the perplexity of the SCAP folder with OpenVINO's operations and with the C++ ones.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import optimum.intel
import torch
from machine import describe_machine
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense", type=Path)
    parser.add_argument("sparse", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    result: dict[str, Any] = {"machine": describe_machine()}
    for name, folder in (("dense", arguments.dense), ("scap", arguments.sparse)):
        values = differences(folder, text, arguments.tokens)
        result[name] = values
        print(f"{name}: at once against token by token, median {np.median(values):.1e}, largest {max(values):.1e}")
    tokenizer = AutoTokenizer.from_pretrained(str(arguments.sparse))
    for package in (optimum.intel, optimum_scap):
        model = package.OVModelForCausalLM.from_pretrained(str(arguments.sparse), ov_config=dict(EXACT))
        value = perplexity(model, tokenizer, text, max_tokens=4096)
        result[f"perplexity {package.__name__}"] = value
        print(f"perplexity of SCAP with {package.__name__}: {value:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
