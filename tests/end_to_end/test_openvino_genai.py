"""The ways in which openvino_genai serves: the fused IR gives the text of the portable one in all of them.

What stands behind a text: float32 throughout. A hint of f32 is not enough for that, see `EXACT`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import optimum_cli_in_process

from optimum_scap import SCAPError, load_parameters
from optimum_scap.openvino.extension.build import ExtensionBuildError
from optimum_scap.openvino.genai import register_operations
from optimum_scap.openvino.inference import EXACT


PROMPTS = [
    "In the north of the country, along the shores of the great lakes, water boils at",
    "The following is a list of facts about rivers, seas and lakes. In computing, a hash table is",
]
SHORT = ["Water boils at"]
RUN = """
import json, sys
import openvino_genai as genai
from optimum_scap.openvino.genai import register_operations

register_operations()
exact, runs = json.loads(sys.argv[1])
for folder, prompts, batched, scheduling, options, draft in runs:
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    for name, value in scheduling.items():
        setattr(scheduler, name, value)
    how = {"scheduler_config": scheduler}
    if draft is not None:
        how["draft_model"] = genai.draft_model(draft, "CPU", **exact)
    if "max_ngram_size" in options:
        how["prompt_lookup"] = True
    pipeline = genai.LLMPipeline(folder, "CPU", **how, **exact)
    options = {"max_new_tokens": 12, "do_sample": False, "apply_chat_template": False} | options
    config = genai.GenerationConfig(**options)
    batches = [prompts] if batched else [[prompt] for prompt in prompts]
    print(json.dumps([text for batch in batches for text in pipeline.generate(batch, config).texts]), flush=True)
"""
LOOKUP = {"num_assistant_tokens": 3, "max_ngram_size": 3}
DRAFT = {"num_assistant_tokens": 3}


def texts_of(*runs: tuple) -> list[list[str]]:
    """Of pipelines made one after the other in one process.

    Args:
        runs: folder, prompts, whether they are served at once, what the scheduler is told, options of the
            generation, and the folder of a draft model or None.
    """
    arguments = json.dumps([EXACT, runs], default=str)
    run = subprocess.run([sys.executable, "-c", RUN, arguments], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def fused(sparse_int8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuse(sparse_int8, tmp_path_factory.mktemp("genai") / "fused")


def fuse(folder: Path, output: Path) -> Path:
    result = optimum_cli_in_process("scap", "fuse", folder, output, "--precision", "f32")
    assert result.returncode == 0, result.stderr
    return output


def test_continuous_batching_prefix_caching_and_prompt_lookup(sparse_int8: Path, fused: Path) -> None:
    ways = [
        (PROMPTS, False, {}, {}, None),
        (PROMPTS, True, {"max_num_batched_tokens": 16}, {}, None),  # prompts in pieces, beside what is decoded
        (PROMPTS * 2, False, {"enable_prefix_caching": True}, {}, None),
        (PROMPTS, False, {}, LOOKUP, None),
    ]
    texts = texts_of(*((folder, *way) for way in ways for folder in (sparse_int8, fused)))
    for portable, found in zip(texts[::2], texts[1::2], strict=True):
        assert found == portable and all(portable)
    assert texts[4][:2] == texts[0]  # nothing was cached yet


def test_speculative_decoding_with_dense_and_sparse_drafts(dense_int8: Path, sparse_int8: Path, fused: Path) -> None:
    pairs = [(dense_int8, None), (dense_int8, fused), (sparse_int8, dense_int8), (fused, dense_int8)]
    pairs += [(sparse_int8, sparse_int8), (fused, fused)]
    texts = texts_of(*((model, SHORT, False, {}, DRAFT if draft else {}, draft) for model, draft in pairs))
    assert all(text for found in texts for text in found)
    assert texts[1] == texts[0]  # whatever the draft says
    assert texts[3] == texts[2] and texts[5] == texts[4]


@pytest.mark.slow
def test_decode_only_leaves_prompts_dense_under_paged_attention(
    dense_int8: Path, sparse_int8: Path, tmp_path: Path
) -> None:
    """Each token is a sequence of its own there: steps of more than 8 tokens are dense, as these prompts are."""
    load = optimum_cli_in_process("scap", "info", sparse_int8, "--json", tmp_path / "parameters.json")
    assert load.returncode == 0, load.stderr
    assert load_parameters(tmp_path / "parameters.json").layers
    portable = tmp_path / "decode"
    command = ("--scap-parameters", tmp_path / "parameters.json", "--scap-apply-to", "decode")
    result = optimum_cli_in_process("scap", "apply", dense_int8, portable, *command)
    assert result.returncode == 0, result.stderr
    fused = fuse(portable, tmp_path / "fused")
    one, many = {"max_new_tokens": 1}, [PROMPTS[0]] * 9
    ways = [(PROMPTS, False, {}, one, None), (PROMPTS, False, {}, {}, None), (many, True, {}, {}, None)]
    texts = texts_of(
        (dense_int8, *ways[1]),
        (sparse_int8, *ways[1]),
        *((folder, *way) for way in ways for folder in (portable, fused)),
    )
    dense, everywhere, *pairs = texts
    assert pairs[::2] == pairs[1::2]
    first, whole, of_many = pairs[::2]
    assert all(text.startswith(token) for text, token in zip(dense, first, strict=True))
    assert whole != dense and whole != everywhere
    assert of_many == dense[:1] * 9  # more than 8 sequences are dense


def test_registering_what_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExtensionBuildError, match=r"none\.so cannot be loaded: .*none\.so"):
        register_operations(tmp_path / "none.so")
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    with pytest.raises(SCAPError, match="pip install openvino-genai"):
        register_operations(tmp_path / "other.so")
