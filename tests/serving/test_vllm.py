"""Sparse checkpoints in vLLM itself, on the CPU: `make test-vllm`. Each test runs it in a process of its own."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    LAYERS,
    VOCAB,
    layer,
    quantization_config,
    write_checkpoint,
    write_config,
    write_integer_checkpoint,
)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]

PROMPTS = [
    [3 + (7 * row + 5 * place) % (VOCAB - 3) for place in range(count)] for row, count in enumerate((5, 30, 1, 17))
]
TOKENS = 6
RUN = """
import json, sys
from vllm import LLM, SamplingParams

def main():
    folder, prompts, tokens, options = json.loads(sys.argv[1])
    llm = LLM(folder, dtype="float32", max_model_len=128, max_logprobs=-1, logprobs_mode="raw_logits", **options)
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=-1, ignore_eos=True, detokenize=False)
    found = []
    for output in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling):
        steps = [[step[token].logprob for token in range(len(step))] for step in output.outputs[0].logprobs]
        found.append((list(output.outputs[0].token_ids), steps))
    print("FOUND" + json.dumps(found), flush=True)

if __name__ == "__main__":
    main()
"""


def environment(**more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "TRITON_INTERPRET")}
    return {
        **clean,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def run(folder: Path, prompts: list[list[int]] = PROMPTS, **options: Any) -> subprocess.CompletedProcess[str]:
    script = folder.parent / "run_vllm.py"
    script.write_text(RUN, encoding="utf-8")
    more = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if options.get("tensor_parallel_size", 1) > 1 else {}
    arguments = json.dumps([str(folder), prompts, TOKENS, options])
    return subprocess.run(
        [sys.executable, str(script), arguments], capture_output=True, text=True, env=environment(**more), timeout=300
    )


def logits_of(result: subprocess.CompletedProcess[str]) -> list[tuple[list[int], list[list[float]]]]:
    lines = [line for line in result.stdout.splitlines() if line.startswith("FOUND")]
    assert lines, (result.stdout + result.stderr)[-6000:]
    return json.loads(lines[0].removeprefix("FOUND"))


def check_against_transformers(folder: Path, found: list[tuple[list[int], list[list[float]]]]) -> None:
    from transformers import AutoModelForCausalLM

    import optimum_scap  # noqa: F401  registers the method

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, (tokens, steps) in zip(PROMPTS, found, strict=False):
        assert len(tokens) == TOKENS
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0]
        wanted = logits[len(prompt) - 1 : len(prompt) - 1 + TOKENS]
        torch.testing.assert_close(torch.tensor(steps), wanted, rtol=0, atol=1e-5)


def dense_logits_differ(folder: Path, found: list[tuple[list[int], list[list[float]]]]) -> bool:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
    return bool((logits - torch.tensor(found[0][1][0])).abs().max() > 0.01)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("served") / "sparse")


@pytest.fixture(scope="module")
def mixed_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of float and of integer weights."""
    return write_integer_checkpoint(tmp_path_factory.mktemp("served") / "mixed")


def test_compiled_steps_of_several_requests_have_the_logits_of_transformers(mixed_checkpoint: Path) -> None:
    """Prompts are cut into chunks of 16 tokens, so that steps mix prefill with decoding."""
    found = logits_of(run(mixed_checkpoint, max_num_batched_tokens=16, max_num_seqs=4, enable_chunked_prefill=True))
    check_against_transformers(mixed_checkpoint, found)


def test_two_ranks_have_the_logits_of_transformers(mixed_checkpoint: Path) -> None:
    found = logits_of(run(mixed_checkpoint, tensor_parallel_size=2, enforce_eager=True))
    check_against_transformers(mixed_checkpoint, found)


def test_a_single_request_has_the_logits_of_transformers(checkpoint: Path) -> None:
    found = logits_of(run(checkpoint, PROMPTS[:1], enforce_eager=True))
    assert dense_logits_differ(checkpoint, found)
    check_against_transformers(checkpoint, found)


def test_decode_alone_is_pruned_where_the_checkpoint_says_so(tmp_path: Path) -> None:
    """A prompt of 30 tokens is dense, and each token after it one row that is pruned."""
    from transformers import AutoModelForCausalLM

    import optimum_scap  # noqa: F401  registers the method

    folder = write_checkpoint(tmp_path / "decode", apply_to="decode")
    prompt = PROMPTS[1]
    ((tokens, steps),) = logits_of(run(folder, [prompt], enforce_eager=True))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = []
    with torch.no_grad():
        out = model(torch.tensor([prompt]), use_cache=True)
        wanted.append(out.logits[0, -1])
        for token in tokens[:-1]:
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            wanted.append(out.logits[0, -1])
        dense = model(torch.tensor([prompt + tokens])).logits[0, len(prompt)]
    torch.testing.assert_close(torch.tensor(steps), torch.stack(wanted), rtol=0, atol=1e-5)
    assert (dense - wanted[1]).abs().max() > 0.01


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_the_server_answers_a_request(checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "128"]
    command += ["--enforce-eager", "--served-model-name", "sparse"]
    with (tmp_path / "log").open("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment())
        try:
            body = {"model": "sparse", "prompt": PROMPTS[0], "max_tokens": 3, "temperature": 0.0, "ignore_eos": True}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            answer = None
            end = time.monotonic() + 300
            while answer is None:
                assert server.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()[-6000:]
                try:
                    with urllib.request.urlopen(request, timeout=60) as response:
                        answer = json.load(response)
                except (ConnectionError, urllib.error.URLError):
                    time.sleep(1)
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
    assert answer["usage"]["completion_tokens"] == 3


def test_damaged_parameters_are_refused_in_a_line_before_weights_are_loaded(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "damaged")
    path = "model.layers.0.mlp.up_proj"
    write_config(folder, quantization_config({path: {**layer(0.5), "threshold": "large"}}))
    (folder / "model.safetensors").write_bytes(b"not read")
    result = run(folder, PROMPTS[:1], enforce_eager=True)
    said = [line for line in (result.stdout + result.stderr).splitlines() if "damaged SCAP parameters" in line]
    assert result.returncode != 0 and said, (result.stdout + result.stderr)[-3000:]
    assert f"layers.{path}.threshold" in said[-1]
    assert "Loading safetensors" not in result.stderr


def test_a_layer_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "strange", vectors=False)
    path = f"model.layers.{LAYERS}.mlp.up_proj"
    write_config(folder, quantization_config({"model.layers.0.mlp.up_proj": layer(0.5), path: layer(0.5)}))
    result = run(folder, PROMPTS[:1], enforce_eager=True)
    assert result.returncode != 0
    assert f"vLLM's model has no layer {path} to prune" in result.stdout + result.stderr
