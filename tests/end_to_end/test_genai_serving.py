"""openvino_genai's server paths on a real model: a fused IR gives the text of the portable one under f32."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import optimum_cli_in_process
from cpu import knows_the_order_of_sums

from optimum_scap.openvino.extension.build import build_extension


pytestmark = pytest.mark.slow

PROMPTS = ["Water boils at", "The capital of France is", "one two three four one two three four one two", "A"]
RUN = """
import json, sys
import openvino_genai as genai

folder, library, draft, ways = json.loads(sys.argv[1])
config = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
if library:
    config["extensions"] = [library]
prompts = json.loads(sys.argv[2])
for way in ways:
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    scheduler.enable_prefix_caching = way == "prefix caching"
    options, assistant = {}, {}
    if way == "prompt lookup":
        options["prompt_lookup"] = True
        assistant = {"num_assistant_tokens": 3, "max_ngram_size": 2}
    elif way == "draft":
        options["draft_model"] = genai.draft_model(draft, "CPU", **config)
        assistant = {"num_assistant_tokens": 3}
    pipeline = genai.LLMPipeline(folder, "CPU", scheduler_config=scheduler, **options, **config)
    wanted = genai.GenerationConfig(max_new_tokens=12, do_sample=False, apply_chat_template=False, **assistant)
    if options:
        texts = [pipeline.generate(prompt, wanted) for prompt in prompts]
    else:  # the second time the prefixes are there
        texts = [pipeline.generate(prompts, wanted).texts for _ in range(2)]
    print(json.dumps([way, texts]), flush=True)
"""
WAYS = ["continuous batching", "prefix caching", "prompt lookup", "draft"]


@pytest.fixture(scope="module")
def fused(sparse_int8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("fused") / "model"
    result = optimum_cli_in_process("scap", "fuse", "--precision", "f32", sparse_int8, output)
    assert result.returncode == 0, result.stderr
    return output


def texts(folder: Path, library: Path | None, draft: Path) -> dict[str, Any]:
    arguments = [json.dumps([str(folder), str(library or ""), str(draft), WAYS]), json.dumps(PROMPTS)]
    run = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-4000:]
    return dict(json.loads(line) for line in run.stdout.splitlines() if line.startswith("["))


def test_the_fused_model_says_what_the_portable_one_says(sparse_int8: Path, dense_int8: Path, fused: Path) -> None:
    portable = texts(sparse_int8, None, dense_int8)
    fast = texts(fused, build_extension(), dense_int8)
    assert fast.keys() == portable.keys() == set(WAYS)
    assert all(len(found) == (2 if way in WAYS[:2] else len(PROMPTS)) for way, found in fast.items())
    if knows_the_order_of_sums():
        assert fast == portable
