"""Speed and memory of exported models on this machine, interleaved so that noise hits all of them alike."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.lengths import clamp_length, longest_sequence
from ..errors import SCAPError
from .sparsity import by_role


PROMPT = (
    "The history of the steam engine begins long before the railways. In the first century, Hero of Alexandria "
    "described a hollow sphere that steam made spin. For a long time it remained a toy, until miners needed a way to "
    "pump water out of their mines"
)


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of repeated measurements."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.smallest:.3g}, {self.largest:.3g}]"


@dataclass(frozen=True)
class Measurement:
    """One model: speeds in tokens per second of the model's own steps (no sampling), memory and load time.

    Attributes:
        prefill: by the number of tokens.
        first_token_seconds: loading and one token (OpenVINO only). Stock OpenVINO repacks weights when it first uses
            them, the C++ operations while they are loaded: only the sum compares them.
    """

    name: str
    folder: str
    prefill: dict[int, Spread]
    decode: Spread
    peak_memory_mib: float
    load_seconds: float
    first_token_seconds: float | None = None


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


def load(folder: Path, fast: bool, **options: Any) -> Any:
    """The causal language model in `folder`, with the C++ operations (`fast`) or as stock optimum-intel loads it.

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


def _build_ahead() -> None:
    """Compiles the extension, once in a machine's life, so that it is no part of the first model's load time."""
    from ..openvino.extension.build import ExtensionBuildError, build_extension

    with suppress(ExtensionBuildError):  # the model says so when it is loaded
        build_extension()


def measure(
    models: dict[str, tuple[Path, bool]],
    *,
    prompt_tokens: Sequence[int] = (128,),
    new_tokens: int = 64,
    repeats: int = 5,
) -> list[Measurement]:
    """Measures models side by side.

    Args:
        models: folder and whether to use the C++ operations, by name.
        prompt_tokens: tokens per prefill, one or several lengths.
        new_tokens: tokens decoded one by one behind the first of them.
        repeats: how often; every token of every repeat goes through all models in turn.

    Raises:
        SCAPError: if a folder cannot be measured.
    """
    if any(fast for _, fast in models.values()):
        _build_ahead()
    usage = {name: _load_in_fresh_process(folder, fast) for name, (folder, fast) in models.items()}
    loaded = {name: load(folder, fast) for name, (folder, fast) in models.items()}
    behind = prompt_tokens[0]
    longest = max(behind + new_tokens, *prompt_tokens)
    for name, model in loaded.items():
        check_length(name, model, longest)
    ids = _text(loaded, models, longest)
    steppers = {name: Stepper(model.request.get_compiled_model()) for name, model in loaded.items()}
    prefill: dict[str, dict[int, list[float]]] = {name: {length: [] for length in prompt_tokens} for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):  # the first one warms up
        # Decoding continues the prompt that was read last.
        for length in [*prompt_tokens[1:], behind]:
            for name, step in steppers.items():
                seconds = step(ids[:, :length], 0)
                if repeat:
                    prefill[name][length].append(length / seconds)
        spent = dict.fromkeys(models, 0.0)
        for past in range(behind, behind + new_tokens):
            for name, step in steppers.items():
                spent[name] += step(ids[:, past : past + 1], past)
        if repeat:
            for name, seconds in spent.items():
                decode[name].append(new_tokens / seconds)
    return [
        Measurement(
            name,
            folder.name,
            {length: Spread.of(values) for length, values in prefill[name].items()},
            Spread.of(decode[name]),
            *usage[name],
        )
        for name, (folder, _) in models.items()
    ]


def realised_sparsity(folder: Path, tokens: int = 192) -> dict[str, float]:
    """{role: fraction of input channels skipped} on text that the model itself generates."""
    from ..openvino.backend import measure_sparsity
    from ..openvino.graph import find_fully_connected

    model = load(folder, fast=False, compile=False)
    ids = _generate(model, folder, clamp_length(tokens, model.config))
    model.request = None
    import torch

    sample = model.prepare_inputs(torch.from_numpy(ids), torch.ones(ids.shape, dtype=torch.int64))
    roles = {layer.path: layer.role for layer in find_fully_connected(model.model)}
    return by_role(measure_sparsity(model.model, [sample], 1), roles)


def as_json(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    return [asdict(measurement) for measurement in measurements]


def _text(loaded: dict[str, Any], models: dict[str, tuple[Path, bool]], tokens: int) -> np.ndarray:
    name = next(iter(loaded))
    return _generate(loaded[name], models[name][0], tokens)


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


def _load_in_fresh_process(folder: Path, fast: bool) -> tuple[float, float, float]:
    """(peak resident MiB, seconds to load, seconds until the first token) of a process that runs one token."""
    # The current folder may be a model's, and Python would look for modules there.
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [sys.executable, "-m", "optimum_scap.evaluation.load_once", str(folder.resolve())]
        result = subprocess.run(
            [*command, *(["--fast"] if fast else [])],
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
            f"model folder {folder}: the process that loads it ended without an answer: {reason[0]}"
        ) from None
    if "error" in answer:
        raise SCAPError(answer["error"])
    return answer["peak_memory_mib"], answer["load_seconds"], answer["first_token_seconds"]


def _absolute_python_path() -> str:
    """PYTHONPATH for a process that starts in another folder."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(str(Path(entry).absolute()) for entry in entries if entry)
