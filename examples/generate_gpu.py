"""Streams text from a sparse PyTorch checkpoint and from the dense model inside it, with the tokens/s of each.

    optimum-cli export torch -m MODEL --scap up=0.35,gate=0.35,down=0.55 --dtype float16 model-scap
    python examples/generate_gpu.py model-scap "The sea is"

On a GPU generate() runs with a static cache, so that transformers compiles the step of one token into a CUDA graph.
On a CPU it runs as it is: there the sparse operation is plain torch, which shows the text but gains no speed (use
OpenVINO).
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TextStreamer

from optimum_scap.evaluation.torch_speed import load


class TimedStreamer(TextStreamer):
    """Prints text as it comes, and notes when the first and the latest token came."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt first, then one token at a time."""
        self.times.append(time.perf_counter())
        super().put(value)

    def tokens_per_second(self) -> float:
        """Of decoding: without the prompt, and without the token that its forward already gives."""
        return (len(self.times) - 2) / (self.times[-1] - self.times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a sparse PyTorch checkpoint")
    parser.add_argument("prompt", nargs="?", default="The sea is")
    parser.add_argument("--new-tokens", type=int, default=128)
    arguments = parser.parse_args()
    if arguments.new_tokens < 2:
        parser.error("--new-tokens must be at least 2: the first token comes from the prompt")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(device)
    speeds = {}
    for name in ("dense", "SCAP"):
        model = load(arguments.model, name == "SCAP", device)
        options: dict[str, Any] = {"min_new_tokens": arguments.new_tokens, "max_new_tokens": arguments.new_tokens}
        if device.type == "cuda":
            options["cache_implementation"] = "static"
            for _ in range(2):  # compiles the step and records its graph
                model.generate(**inputs, **options, do_sample=False)
        print(f"\n--- {name} ---")
        streamer = TimedStreamer(tokenizer)
        model.generate(**inputs, **options, do_sample=False, streamer=streamer)
        speeds[name] = streamer.tokens_per_second()
        print(f"--- {speeds[name]:.1f} tokens/s ---")
        del model
    print(f"\nSCAP / dense: {speeds['SCAP'] / speeds['dense']:.2f}x")


if __name__ == "__main__":
    main()
