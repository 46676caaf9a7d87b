"""Speed and memory of exported models on this machine, interleaved so that noise hits all of them alike."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.config import DenseLayers
from ..data.lengths import clamp_length, longest_sequence
from ..errors import SCAPError
from .machine import describe_machine
from .report import Quantity, Report
from .sparsity import RealizedSparsity, realized_by_openvino


PROMPT = (
    "The history of the steam engine begins long before the railways. In the first century, Hero of Alexandria "
    "described a hollow sphere that steam made spin. For a long time it remained a toy, until miners needed a way to "
    "pump water out of their mines"
)


DENSE, STOCK, SCAP, PORTABLE = "dense", "SCAP, dense layers stock", "SCAP", "SCAP, portable"


@dataclass(frozen=True)
class Contestant:
    """A model folder and how it is run.

    Attributes:
        folder: an OpenVINO folder or a PyTorch checkpoint.
        fast: whether sparsely: with the C++ operations, or of a checkpoint the sparse model instead of the dense one
            in it.
        dense_layers: with `fast`, what becomes of layers that are not pruned instead of what the folder says.
    """

    folder: Path
    fast: bool
    dense_layers: DenseLayers | None = None


def report_of(
    contestants: Mapping[str, Contestant],
    quantities: Iterable[Quantity],
    sparsity: Mapping[str, RealizedSparsity],
    settings: Mapping[str, Any],
    *,
    gpu: bool = False,
) -> Report:
    """What was measured here and now. Ratios refer to the dense model, or where there is none to the portable one."""
    return Report(
        machine=describe_machine(gpu=gpu),
        settings=dict(settings),
        contestants={name: contestant.folder.name for name, contestant in contestants.items()},
        baseline=next(name for name in (DENSE, PORTABLE, *contestants) if name in contestants),
        quantities=tuple(quantities),
        sparsity=dict(sparsity),
    )


def speed_quantities(
    prefill: Mapping[int, Mapping[str, Sequence[float]]], decode: Mapping[str, Sequence[float]]
) -> list[Quantity]:
    """Rows of the model's own steps (no sampling) in tokens per second, by contestant; of `prefill` also by length."""
    rows = {"decode": decode, **{f"prefill of {length} tokens": values for length, values in prefill.items()}}
    return [
        Quantity(name=name, unit="tokens/s", values={key: tuple(found) for key, found in values.items()})
        for name, values in rows.items()
    ]


class Stepper:
    """Feeds a stateful decoder (an `openvino.CompiledModel`) its tokens directly, without `generate`'s Python loop."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._names = {name for port in compiled.inputs for name in port.get_names()}

    def __call__(self, ids: np.ndarray, past: int) -> float:
        """Seconds of one inference of `ids` [1, tokens] behind `past` tokens."""
        length = ids.shape[1]
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((1, past + length), dtype=np.int64),
            "position_ids": np.arange(past, past + length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        if past == 0:
            self._request.reset_state()
        started = time.perf_counter()
        self._request.infer({name: value for name, value in inputs.items() if name in self._names})
        return time.perf_counter() - started


def load(folder: Path, fast: bool, *, dense_layers: DenseLayers | None = None, **options: Any) -> Any:
    """The causal language model in `folder`, with the C++ operations (`fast`) or as stock optimum-intel loads it.

    `dense_layers` is for the former, see `Contestant`; the latter knows nothing of it.

    Raises:
        SCAPError: if it is no stateful causal language model or cannot be loaded.
    """
    import optimum.intel

    from ..openvino.files import check_folder
    from ..openvino.modeling import OVModelForCausalLM
    from ..openvino.optimum_intel import quiet_offline_guess
    from ..tasks import infer_task

    quiet_offline_guess()
    check_folder(folder)
    task = infer_task(folder)
    if not task.startswith("text-generation"):
        raise SCAPError(f"model folder {folder}: only text generation can be measured so far, this is {task}")
    cls: Any = OVModelForCausalLM if fast else optimum.intel.OVModelForCausalLM
    if fast:
        options["dense_layers"] = dense_layers
    model = cls.from_pretrained(str(folder), export=False, **options)
    if not model.stateful:
        raise SCAPError(f"model folder {folder}: only stateful models can be measured (exported without KV inputs)")
    return model


def check_length(name: str, model: Any, tokens: int) -> None:
    """Checks that `model`, called `name`, takes so many tokens.

    Raises:
        SCAPError: otherwise.
    """
    longest = longest_sequence(model.config)
    if longest is not None and tokens > longest:
        raise SCAPError(
            f"--prompt-tokens and --new-tokens ask for {tokens} tokens in all, the {name} model takes {longest}"
        )


def openvino_contestants(model: Path, baseline: Path | None = None, *, portable: bool = True) -> dict[str, Contestant]:
    """Who is compared when the sparse OpenVINO folder `model` is measured, by name.

    Args:
        model: its folder.
        baseline: the folder of the dense model, if there is one.
        portable: whether OpenVINO's own operations are measured too.
    """
    found = {} if baseline is None else {DENSE: Contestant(baseline, fast=False)}
    if _replaces_dense_layers(model):  # what is left of the speed-up without is a column of its own
        found[STOCK] = Contestant(model, fast=True, dense_layers="stock")
    found[SCAP] = Contestant(model, fast=True)
    if portable:
        found[PORTABLE] = Contestant(model, fast=False)
    return found


def _replaces_dense_layers(folder: Path) -> bool:
    """Whether the C++ operations take the place of dense layers, too, when the model in `folder` is loaded."""
    from ..openvino.arithmetic import preferred_precision
    from ..openvino.extension.build import ExtensionBuildError, build_extension
    from ..openvino.files import model_files, read_model
    from ..openvino.fuse import replaces_dense_layers

    # Compiled once in a machine's life, so that it is no part of the first model's load time.
    try:
        library = build_extension()
    except ExtensionBuildError:  # the model says so when it is loaded
        return False
    precision = preferred_precision()
    return any(
        replaces_dense_layers(read_model(path), precision=precision, library=library) for path in model_files(folder)
    )


def measure(
    contestants: Mapping[str, Contestant],
    *,
    prompt_tokens: Sequence[int] = (128,),
    new_tokens: int = 64,
    repeats: int = 5,
) -> list[Quantity]:
    """Measures models side by side.

    Args:
        contestants: by name.
        prompt_tokens: tokens per prefill, one or several lengths.
        new_tokens: tokens decoded one by one behind the first of them.
        repeats: how often; every token of every repeat goes through all models in turn.

    Returns:
        Decode and prefill, peak memory, the time to load, and that to load and compute one token. Stock OpenVINO
        repacks weights when it first uses them, the C++ operations while they are loaded: only the sum compares them.

    Raises:
        SCAPError: if a folder cannot be measured.
    """
    usage = {name: _load_in_fresh_process(contestant) for name, contestant in contestants.items()}
    loaded = {
        name: load(contestant.folder, contestant.fast, dense_layers=contestant.dense_layers)
        for name, contestant in contestants.items()
    }
    behind = prompt_tokens[0]
    longest = max(behind + new_tokens, *prompt_tokens)
    for name, model in loaded.items():
        check_length(name, model, longest)
    first = next(iter(contestants))
    ids = _generate(loaded[first], contestants[first].folder, longest)
    steppers = {name: Stepper(model.request.get_compiled_model()) for name, model in loaded.items()}
    prefill: dict[int, dict[str, list[float]]] = {length: {name: [] for name in loaded} for length in prompt_tokens}
    decode: dict[str, list[float]] = {name: [] for name in loaded}
    for repeat in range(repeats + 1):  # the first one warms up
        # Decoding continues the prompt that was read last.
        for length in [*prompt_tokens[1:], behind]:
            for name, step in steppers.items():
                seconds = step(ids[:, :length], 0)
                if repeat:
                    prefill[length][name].append(length / seconds)
        spent = dict.fromkeys(loaded, 0.0)
        for past in range(behind, behind + new_tokens):
            for name, step in steppers.items():
                spent[name] += step(ids[:, past : past + 1], past)
        if repeat:
            for name, seconds in spent.items():
                decode[name].append(new_tokens / seconds)
    rows = (("peak memory", "MiB"), ("load", "s"), ("load and first token", "s"))
    return speed_quantities(prefill, decode) + [
        Quantity(name=row, unit=unit, values={name: (found[index],) for name, found in usage.items()})
        for index, (row, unit) in enumerate(rows)
    ]


def realized_sparsity(folder: Path, tokens: int = 192) -> RealizedSparsity:
    """What the sparse model in `folder` skips on text that it generates itself."""
    import torch

    model = load(folder, fast=False, compile=False)
    ids = _generate(model, folder, clamp_length(tokens, model.config))
    model.request = None
    sample = model.prepare_inputs(torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.int64))
    return realized_by_openvino(model.model, [sample], 1)


def _generate(model: Any, folder: Path, tokens: int) -> np.ndarray:
    """Token ids `[1, tokens]`: the prompt and how the model goes on, so that activations are those of real use."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    inputs = tokenizer(PROMPT, return_tensors="pt")
    missing = tokens - inputs["input_ids"].shape[1]
    ids = inputs["input_ids"]
    if missing > 0:
        ids = model.generate(**inputs, min_new_tokens=missing, max_new_tokens=missing, do_sample=False)
    return ids[:, :tokens].numpy().astype(np.int64)


def _load_in_fresh_process(contestant: Contestant) -> tuple[float, float, float]:
    """(peak resident MiB, seconds to load, seconds until the first token) of a process that runs one token."""
    # The current folder may be a model's, and Python would look for modules there.
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [sys.executable, "-m", "optimum_scap.evaluation.load_once", str(contestant.folder.resolve())]
        if contestant.fast:
            command.append("--fast")
            command += ["--dense-layers", contestant.dense_layers] if contestant.dense_layers else []
        result = subprocess.run(
            command,
            cwd=elsewhere,
            env={**os.environ, "PYTHONPATH": _absolute_python_path()},
            capture_output=True,
            text=True,
        )
    try:
        answer = json.loads(result.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        reason = result.stderr.strip().splitlines()[-1:] or [f"exit code {result.returncode}"]
        raise SCAPError(
            f"model folder {contestant.folder}: the process that loads it ended without an answer: {reason[0]}"
        ) from None
    if "error" in answer:
        raise SCAPError(answer["error"])
    return answer["peak_memory_mib"], answer["load_seconds"], answer["first_token_seconds"]


def _absolute_python_path() -> str:
    """PYTHONPATH for a process that starts in another folder."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(str(Path(entry).absolute()) for entry in entries if entry)
