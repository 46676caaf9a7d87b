"""SCAP and CATS at equal quality: which share of the FFN weights may each skip for the same perplexity?

CATS (arXiv 2404.08763) prunes the neurons of a gated FFN whose activated gate is small: the rows of `up` and the
columns of `down` are skipped, `gate` is read whole. Written here in plain torch from the paper's formula, with one
threshold per layer, calibrated like SCAP's behind layers that are sparse already. Runs in f32; prints a table, writes
JSON with --json.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scaffold import add_texts, new_parser, write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_scap import SCAPConfig, sparsify_activations
from optimum_scap.data.text import token_windows
from optimum_scap.evaluation.perplexity import perplexity, token_samples
from optimum_scap.evaluation.sparsity import realized_by_torch


class CatsFeedForward(nn.Module):
    """`down(prune(act(gate(x))) * up(x))`; calibrates itself on the first input that it sees."""

    def __init__(self, dense: Any, sparsity: float) -> None:
        super().__init__()
        self.dense = dense
        self.sparsity = sparsity
        self.threshold: float | None = None
        self.pruned = self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        activated = self.dense.act_fn(self.dense.gate_proj(x))
        magnitude = activated.abs()
        if self.threshold is None:
            rank = max(1, round(self.sparsity * magnitude.numel()))
            self.threshold = float(magnitude.flatten().kthvalue(rank).values)
        pruned = magnitude <= self.threshold
        self.pruned += int(pruned.sum())
        self.seen += pruned.numel()
        return self.dense.down_proj(torch.where(pruned, 0.0, activated) * self.dense.up_proj(x))


def main() -> None:
    parser = new_parser(__doc__)
    add_texts(parser, "Hugging Face model folder, with gated FFNs")
    parser.add_argument("--cats", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.evaluation.read_text(encoding="utf-8")
    windows = token_windows(arguments.calibration, tokenizer, arguments.num_samples, arguments.seq_len)
    calibration = torch.tensor([window["input_ids"] for window in windows])

    def row(method: str, setting: str, model: Any, skipped: float | None) -> dict[str, Any]:
        value = perplexity(model, tokenizer, text, max_tokens=arguments.max_tokens)
        return {"method": method, "setting": setting, "weights skipped": skipped, "perplexity": value}

    rows = [row("dense", "", _load(arguments.model), 0.0)]
    for spec in arguments.scap or ["up=0.35,gate=0.35,down=0.55", "up=0.4,gate=0.4,down=0.7"]:
        model = _load(arguments.model)
        config = SCAPConfig.from_spec(spec, num_samples=arguments.num_samples, seq_len=arguments.seq_len)
        sparsify_activations(model, config, arguments.calibration, tokenizer=tokenizer)
        samples = token_samples(tokenizer, text, window=512, max_tokens=arguments.max_tokens)
        rows.append(row("SCAP", spec, model, _skipped_by_scap(model, samples)))
    for sparsity in arguments.cats:
        model = _load(arguments.model)
        blocks = _install_cats(model, sparsity)
        with torch.no_grad():
            model.base_model(calibration, use_cache=False)
        for block in blocks:
            block.pruned = block.seen = 0
        found = row("CATS", f"{sparsity:.0%} of the neurons", model, None)
        # Of gate, up and down, which hold as many weights each, two are skipped.
        found["weights skipped"] = 2 / 3 * sum(block.pruned for block in blocks) / sum(block.seen for block in blocks)
        rows.append(found)

    cats = [(0.0, rows[0]["perplexity"])]
    cats += [(found["weights skipped"], found["perplexity"]) for found in rows if found["method"] == "CATS"]
    for found in rows:
        if found["method"] == "SCAP":
            found["CATS skips at this perplexity"] = _interpolate(cats, found["perplexity"])
    table = Table("method", "setting", "FFN weights skipped", "perplexity", "CATS skips at this perplexity")
    for found in rows:
        equal = found.get("CATS skips at this perplexity")
        values = (f"{found['weights skipped']:.1%}", f"{found['perplexity']:.2f}", f"{equal:.1%}" if equal else "")
        table.add_row(found["method"], found["setting"], *values)
    Console(width=120).print(table)
    write(arguments.json, {"tokens": arguments.max_tokens, "rows": rows})


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _install_cats(model: nn.Module, sparsity: float) -> list[CatsFeedForward]:
    blocks = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if all(hasattr(child, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
                blocks.append(CatsFeedForward(child, sparsity))
                setattr(module, name, blocks[-1])
    if not blocks:
        raise SystemExit("the model has no gated FFN with gate_proj, up_proj, down_proj and act_fn")
    return blocks


def _skipped_by_scap(model: Any, samples: list[np.ndarray]) -> float:
    overall = realized_by_torch(model, [{"input_ids": torch.from_numpy(ids)} for ids in samples]).overall
    assert overall is not None
    return overall


def _interpolate(points: list[tuple[float, float]], perplexity: float) -> float | None:
    """The share of weights that CATS skips at `perplexity`; None beyond what was measured."""
    points = sorted(points)
    losses = [math.log(value) for _, value in points]
    if math.log(perplexity) > losses[-1]:
        return None
    return float(np.interp(math.log(perplexity), losses, [skipped for skipped, _ in points]))


if __name__ == "__main__":
    main()
