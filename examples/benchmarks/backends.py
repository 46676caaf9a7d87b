"""Do both backends say the same? Thresholds, logits and perplexity of PyTorch and of OpenVINO, and all against decode.

1. The dense model is calibrated in PyTorch and, exported, in OpenVINO, on the same data: thresholds and perplexity.
2. The sparse PyTorch checkpoint is exported to OpenVINO with its thresholds: logits, token by token, and perplexity.
3. Pruning every forward against pruning one-token forwards only: perplexity of continuations whose prompt is read at
   once and whose tokens are then fed one by one.

All in f32 on the CPU; prints tables, writes JSON with --json.
"""

import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from optimum.intel import OVModelForCausalLM
from rich.console import Console
from rich.table import Table
from scaffold import add_texts, new_parser, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_scap import SCAPConfig, sparsify_activations
from optimum_scap.evaluation.perplexity import perplexity, token_samples
from optimum_scap.openvino.backend import read_parameters as read_openvino_parameters
from optimum_scap.openvino.inference import EXACT, Runner, model_with_outputs
from optimum_scap.openvino.threshold_ops import find_threshold_ops
from optimum_scap.torch.backend import pruned_layers, read_parameters


def main() -> None:
    parser = new_parser(__doc__)
    add_texts(parser, "Hugging Face model folder", "up=0.35,gate=0.35,down=0.55")
    parser.add_argument("--continuations", type=int, default=6, help="windows whose second half is fed one by one")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = arguments.evaluation.read_text(encoding="utf-8")
    config = SCAPConfig.from_spec(arguments.scap, num_samples=arguments.num_samples, seq_len=arguments.seq_len)
    torch_model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    sparsify_activations(torch_model, config, arguments.calibration)
    result: dict[str, Any] = {"scap": arguments.scap, "tokens": arguments.max_tokens}
    with tempfile.TemporaryDirectory() as folder:
        calibrated = _export(arguments.model, Path(folder) / "dense")
        sparsify_activations(calibrated, config, arguments.calibration, tokenizer=tokenizer)
        torch_model.save_pretrained(Path(folder) / "torch")
        tokenizer.save_pretrained(Path(folder) / "torch")
        exported = _export(Path(folder) / "torch", Path(folder) / "sparse")
        result["thresholds"] = _compare_thresholds(torch_model, calibrated)
        result["logits"] = _compare_logits(torch_model, exported, tokenizer, text, arguments.max_tokens)
        models = {
            "calibrated and run in PyTorch": torch_model,
            "calibrated and run in OpenVINO": calibrated,
            "calibrated in PyTorch, exported to OpenVINO": exported,
        }
        result["perplexity"] = {
            name: perplexity(model, tokenizer, text, max_tokens=arguments.max_tokens) for name, model in models.items()
        }
    result["continuations"] = _all_against_decode(torch_model, tokenizer, text, arguments.continuations)
    _print(result)
    write(arguments.json, result)


def _export(model: Path, output: Path) -> OVModelForCausalLM:
    script = str(Path(sys.executable).with_name("optimum-cli"))
    flags = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
    subprocess.run(
        [script, "export", "openvino", "-m", str(model), *flags, str(output)], check=True, capture_output=True
    )
    return OVModelForCausalLM.from_pretrained(str(output), compile=False, ov_config=dict(EXACT))


def _compare_thresholds(torch_model: Any, openvino_model: OVModelForCausalLM) -> dict[str, float]:
    ours, theirs = read_parameters(torch_model), read_openvino_parameters(openvino_model.model)
    assert ours is not None and theirs is not None and ours.layers.keys() == theirs.layers.keys()
    differences = [abs(layer.threshold / theirs.layers[path].threshold - 1) for path, layer in ours.layers.items()]
    return {"layers": len(differences), "median": statistics.median(differences), "largest": max(differences)}


def _compare_logits(
    torch_model: Any, openvino_model: OVModelForCausalLM, tokenizer: Any, text: str, max_tokens: int
) -> dict[str, float]:
    """Relative differences per token: each with its own masks, and PyTorch with the masks that the IR decided on.

    Also until where a window is the same, before a first activation flips.
    """
    differences, agreed, same_masks = [], [], []
    masked = openvino_model.model.clone()
    ops = find_threshold_ops(masked)
    runner = Runner(model_with_outputs(masked, [_logits(masked), *(match.mask for match in ops)]))
    for sample in token_samples(tokenizer, text, window=512, max_tokens=max_tokens):
        ids = torch.from_numpy(sample)
        with torch.no_grad():
            ours = torch_model(ids).logits[0]
        count = sample.shape[1]
        inputs = {"input_ids": sample, "attention_mask": np.ones_like(sample), "beam_idx": np.zeros(1, np.int32)}
        inputs["position_ids"] = np.arange(count, dtype=np.int64)[None]
        logits, *masks = (torch.tensor(value) for value in runner(inputs))
        difference = _differences(ours, logits[0])
        differences += difference
        agreed.append(next((i for i, value in enumerate(difference) if value > 1e-2), len(difference)))
        with _masks_in_force(torch_model, {match.layer.path: mask for match, mask in zip(ops, masks, strict=True)}):
            same_masks += _differences(torch_model(ids).logits[0], logits[0])
    return {
        "median": statistics.median(differences),
        "largest": max(differences),
        "within 1e-2": sum(value <= 1e-2 for value in differences) / len(differences),
        "first token of a window, largest": max(differences[::512]),
        "tokens until the first difference above 1e-2, median": statistics.median(agreed),
        "with the IR's masks, largest": max(same_masks),
    }


def _logits(model: ov.Model) -> ov.Output:
    return next(result.input_value(0) for result in model.get_results() if "logits" in result.output(0).get_names())


def _differences(ours: torch.Tensor, theirs: torch.Tensor) -> list[float]:
    return ((ours - theirs).norm(dim=-1) / ours.norm(dim=-1)).tolist()


@contextmanager
def _masks_in_force(model: Any, masks: dict[str, torch.Tensor]) -> Iterator[None]:
    """Every pruned layer prunes what `masks` (true where pruned, by module path) say instead of deciding itself."""
    layers = pruned_layers(model)
    thresholds = {path: module.scap_threshold for path, module in layers.items()}
    handles = [
        module.register_forward_pre_hook(
            lambda module, inputs, mask=masks[path]: torch.where(mask, module.scap_mode, inputs[0])
        )
        for path, module in layers.items()
    ]
    _set_thresholds(layers, dict.fromkeys(layers, -1.0))  # keeps everything
    with torch.no_grad():
        yield
    _set_thresholds(layers, thresholds)
    for handle in handles:
        handle.remove()


def _set_thresholds(layers: dict[str, Any], thresholds: dict[str, float]) -> None:
    for path, module in layers.items():
        module.scap_threshold = thresholds[path]
        module.prepare()


def _all_against_decode(model: Any, tokenizer: Any, text: str, count: int) -> dict[str, float]:
    """Perplexity of the second half of every window: the first half is read at once, the second token by token."""

    def set_apply_to(value: str) -> None:
        for module in pruned_layers(model).values():
            module.scap_apply_to = value

    values = {}
    windows = [torch.from_numpy(ids) for ids in token_samples(tokenizer, text, window=512, max_tokens=512 * count)]
    for name in ("all", "decode"):
        set_apply_to(name)
        losses = [_continuation_loss(model, ids) for ids in windows]
        values[name] = math.exp(statistics.fmean(losses))
    layers = pruned_layers(model)
    thresholds = {path: module.scap_threshold for path, module in layers.items()}
    _set_thresholds(layers, dict.fromkeys(layers, -1.0))
    values["dense"] = math.exp(statistics.fmean(_continuation_loss(model, ids) for ids in windows))
    _set_thresholds(layers, thresholds)
    set_apply_to("all")
    return values


@torch.no_grad()
def _continuation_loss(model: Any, ids: torch.Tensor) -> float:
    half = ids.shape[1] // 2
    output = model(ids[:, :half], use_cache=True)
    losses = []
    for position in range(half, ids.shape[1]):
        losses.append(float(torch.nn.functional.cross_entropy(output.logits[:, -1], ids[:, position])))
        output = model(ids[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True)
    return statistics.fmean(losses)


def _print(result: dict[str, Any]) -> None:
    console = Console(width=120)
    for name in ("thresholds", "logits", "perplexity", "continuations"):
        table = Table(name, "")
        for key, value in result[name].items():
            table.add_row(key, f"{value:.4g}")
        console.print(table)


if __name__ == "__main__":
    main()
