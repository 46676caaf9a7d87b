"""Speed and memory of a sparse PyTorch checkpoint on this machine, side by side with the dense model inside it."""

import gc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from ..core.config import DenseLayers
from ..core.parameter_files import checkpoint_parameters
from ..errors import SCAPError, first_line
from ..torch.apply import apply_parameters
from ..torch.blocks import has_replaced_dense_layers
from ..torch.checkpoint import make_dense
from .report import Quantity
from .sparsity import RealizedSparsity, realized_by_torch
from .speed import DENSE, PROMPT, SCAP, STOCK, Contestant, check_length, speed_quantities


class DecodeLoop:
    """A causal language model with a static cache, fed its tokens directly.

    Prefill runs as it is; on a GPU the step of one token is compiled as one CUDA graph, which is what keeps a decode
    loop from waiting for Python.

    Args:
        model: a transformers causal language model.
        max_tokens: tokens that the cache holds.
        compiled: whether to compile the step.
    """

    def __init__(self, model: Any, max_tokens: int, compiled: bool) -> None:
        self._model = model
        self._cache = StaticCache(config=model.config, max_cache_len=max_tokens)
        options: Any = {"mode": "reduce-overhead", "fullgraph": True}
        self._step = torch.compile(self._forward, **options) if compiled else self._forward

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, past: int) -> torch.Tensor:
        """Logits `[1, vocabulary]` of the last of `ids` [1, tokens], which stand behind `past` tokens."""
        if past == 0:
            self._cache.reset()
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
        return (self._step if ids.shape[1] == 1 and past else self._forward)(ids, positions)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._model(
            ids, position_ids=positions, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]


def load(folder: Path, sparse: bool, device: torch.device, *, dense_layers: DenseLayers | None = None) -> Any:
    """The causal language model in `folder` on `device`, or the dense model inside it.

    `dense_layers` is for the former, see `Contestant`.

    Raises:
        SCAPError: if it cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(str(folder))
        if not sparse:
            make_dense(config)
        elif sparse and dense_layers is not None:
            config.quantization_config = {**config.quantization_config, "dense_layers": dense_layers}
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder), config=config, dtype="auto")
        return model.to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise SCAPError(f"model folder {folder} cannot be loaded for text generation: {first_line(error)}") from error


def torch_contestants(model: Path, baseline: Path | None = None, *, gpu: bool) -> dict[str, Contestant]:
    """Who is compared when the sparse PyTorch checkpoint `model` is measured, by name.

    Args:
        model: its folder.
        baseline: the folder of the dense model, by default the checkpoint itself, which holds its weights.
        gpu: whether it runs on a GPU: elsewhere dense layers are what they were.
    """
    found = {DENSE: Contestant(baseline or model, fast=False)}
    if gpu and _replaces_dense_layers(model):  # what is left of the speed-up without is a column of its own
        found[STOCK] = Contestant(model, fast=True, dense_layers="stock")
    return found | {SCAP: Contestant(model, fast=True)}


def _replaces_dense_layers(folder: Path) -> bool:
    """Whether dense layers of the checkpoint in `folder` run through a kernel of ours: tried on a model of no weights.

    Raises:
        SCAPError: if there is no such model.
    """
    parameters = checkpoint_parameters(folder)
    if parameters is None or parameters.quantization_config is not None:
        return False  # layers of integer weights run here in any case
    try:
        config = AutoConfig.from_pretrained(str(folder))
        del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, RuntimeError) as error:
        raise SCAPError(f"model folder {folder} cannot be loaded for text generation: {first_line(error)}") from error
    apply_parameters(model, parameters, from_checkpoint=True)
    return has_replaced_dense_layers(model)


def measure(
    contestants: Mapping[str, Contestant],
    *,
    prompt_tokens: Sequence[int] = (128,),
    new_tokens: int = 64,
    repeats: int = 5,
) -> tuple[list[Quantity], dict[str, RealizedSparsity]]:
    """Measures models side by side on the GPU, or on the CPU where there is none.

    Args:
        contestants: by name; all of them must fit on the device together.
        prompt_tokens: tokens per prefill, one or several lengths.
        new_tokens: tokens decoded one by one behind the first of them.
        repeats: how often; models take turns.

    Returns:
        Decode and prefill, peak memory and the time to load; and what the last sparse contestant skips on text that
        the first one generates.

    Raises:
        SCAPError: if a folder cannot be measured.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    behind = prompt_tokens[0]
    longest = max(behind + new_tokens, *prompt_tokens)
    loaded: dict[str, Any] = {}
    loops: dict[str, DecodeLoop] = {}
    usage: dict[str, float] = {}
    memory: dict[str, float] = {}
    for name, contestant in contestants.items():
        started = time.perf_counter()
        loaded[name] = load(contestant.folder, contestant.fast, device, dense_layers=contestant.dense_layers)
        check_length(name, loaded[name], longest)
        _synchronize(device)
        usage[name] = time.perf_counter() - started
        loops[name] = DecodeLoop(loaded[name], longest, device.type == "cuda")
    first = next(iter(contestants))
    ids = _generate(loaded[first], contestants[first].folder, longest)
    prefill: dict[int, dict[str, list[float]]] = {length: {name: [] for name in loaded} for length in prompt_tokens}
    decode: dict[str, list[float]] = {name: [] for name in loaded}
    warm_up = 3 if device.type == "cuda" else 1  # compiling, recording the graph, and a run of it
    for repeat in range(repeats + warm_up):
        for name, loop in loops.items():
            gc.collect()
            before = _allocated(device)
            # Decoding continues the prompt that was read last.
            seconds_prefill = {
                length: _timed(device, loop, ids[:, :length], 0) for length in [*prompt_tokens[1:], behind]
            }
            seconds_decode = _timed_steps(device, loop, ids[:, : behind + new_tokens], behind)
            if repeat == 0:
                memory[name] = (weight_bytes(loaded[name]) + _peak(device) - before) / 2**20
            if repeat >= warm_up:
                for length, seconds in seconds_prefill.items():
                    prefill[length][name].append(length / seconds)
                decode[name].append(new_tokens / seconds_decode)
    sparse = [name for name, contestant in contestants.items() if contestant.fast][-1:]
    quantities = speed_quantities(prefill, decode) + [
        Quantity(name=row, unit=unit, values={name: (value,) for name, value in found.items()})
        for row, unit, found in (("peak memory", "MiB", memory), ("load", "s", usage))
    ]
    return quantities, {name: realized_by_torch(loaded[name], [{"input_ids": ids}]) for name in sparse}


def _generate(model: Any, folder: Path, tokens: int) -> torch.Tensor:
    """Token ids `[1, tokens]`: the prompt and how the model goes on, so that activations are those of real use."""
    from transformers import AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(str(folder))(PROMPT, return_tensors="pt").to(model.device)
    missing = tokens - inputs["input_ids"].shape[1]
    ids = inputs["input_ids"]
    if missing > 0:
        ids = model.generate(**inputs, min_new_tokens=missing, max_new_tokens=missing, do_sample=False)
    return ids[:, :tokens]


def _timed(device: torch.device, loop: DecodeLoop, ids: torch.Tensor, past: int) -> float:
    _synchronize(device)
    started = time.perf_counter()
    loop(ids, past)
    _synchronize(device)
    return time.perf_counter() - started


def _timed_steps(device: torch.device, loop: DecodeLoop, ids: torch.Tensor, past: int) -> float:
    _synchronize(device)
    started = time.perf_counter()
    for position in range(past, ids.shape[1]):
        loop(ids[:, position : position + 1], position)
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> int:
    """Bytes in use on the GPU, from where its peak is counted anew; 0 on a CPU, where only the weights are counted."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers; tied ones count once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())
