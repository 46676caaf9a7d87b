"""Greedy decode speed of llama.cpp, openvino_genai on the dense model and openvino_genai on the SCAP model, in turn.

Needs `llama-cpp-python`, `gguf` and `openvino-genai`. Without --gguf a Llama-shaped model with random weights, of the
shape that openvino_decode.py exports, is written beside the results: Q8_0 or Q4_0, 8.5 and 4.5 bits per weight.
"""

import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from openvino_decode import LLAMA_1B
from scaffold import new_parser, write

from optimum_scap.evaluation.report import Spread
from optimum_scap.folders import fuse_folder
from optimum_scap.openvino.extension.build import build_extension


PROMPT_TOKENS = 128


def write_random_gguf(path: Path, bits: int, vocabulary: int) -> Path:
    """A Llama of LLAMA_1B's shape with random weights and a tokenizer of as many made-up words."""
    import gguf

    kind = {8: gguf.GGMLQuantizationType.Q8_0, 4: gguf.GGMLQuantizationType.Q4_0}[bits]
    hidden, inner = LLAMA_1B["hidden_size"], LLAMA_1B["intermediate_size"]
    heads, kv_heads = LLAMA_1B["num_attention_heads"], LLAMA_1B["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(LLAMA_1B["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(LLAMA_1B["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *[f"word{i}" for i in range(vocabulary - 3)]])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([2, 3, 3, *[1] * (vocabulary - 3)])
    rng = np.random.default_rng(0)

    def add(name: str, rows: int, columns: int) -> None:
        weights = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(0.02)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weights, kind), raw_dtype=kind)

    add("token_embd", vocabulary, hidden)
    add("output", vocabulary, hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for block in range(LLAMA_1B["num_hidden_layers"]):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{name}.weight", np.ones(hidden, np.float32))
        for name, rows, columns in (
            ("attn_q", hidden, hidden),
            ("attn_k", hidden * kv_heads // heads, hidden),
            ("attn_v", hidden * kv_heads // heads, hidden),
            ("attn_output", hidden, hidden),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            add(f"blk.{block}.{name}", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def run_llama_cpp(path: Path, ids: list[int], new_tokens: int):
    """A function that decodes once and returns tokens per second: steps of the model alone, no sampling."""
    from llama_cpp import Llama

    threads = len(os.sched_getaffinity(0))
    settings = {"n_threads": threads, "n_threads_batch": threads, "verbose": False}
    model = Llama(str(path), n_ctx=PROMPT_TOKENS + new_tokens, **settings)

    def decode() -> float:
        model.reset()
        model.eval(ids)
        started = time.perf_counter()
        for _ in range(new_tokens):
            model.eval([5])
        return new_tokens / (time.perf_counter() - started)

    return decode


def run_openvino_genai(folder: Path, ids: list[int], new_tokens: int, extensions: list[str]):
    """The same for openvino_genai: greedy generation, its own figure per output token."""
    import openvino as ov
    import openvino_genai as genai

    pipeline = genai.LLMPipeline(str(folder), "CPU", **({"extensions": extensions} if extensions else {}))
    config = genai.GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, ignore_eos=True)
    tokens = ov.Tensor(np.array([ids], np.int64))
    inputs = genai.TokenizedInputs(tokens, ov.Tensor(np.ones((1, len(ids)), np.int64)))

    def decode() -> float:
        return 1000 / pipeline.generate(inputs, config).perf_metrics.get_tpot().mean

    return decode


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("dense", type=Path)
    parser.add_argument("sparse", type=Path)
    parser.add_argument("--gguf", type=Path, help="GGUF of the same model and bits")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=8, help="of the GGUF that is written")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    ids = np.random.default_rng(0).integers(100, 20000, PROMPT_TOKENS).tolist()
    with tempfile.TemporaryDirectory() as folder:
        fused = Path(folder) / "fused"
        fused.mkdir()
        fuse_folder(arguments.sparse, fused)
        vocabulary = json.loads((arguments.dense / "config.json").read_text())["vocab_size"]
        gguf = arguments.gguf or write_random_gguf(Path(folder) / "random.gguf", arguments.bits, vocabulary)
        extension = str(build_extension())
        runs = {
            f"llama.cpp, {gguf.stat().st_size / 2**20:.0f} MiB": run_llama_cpp(gguf, ids, arguments.new_tokens),
            "openvino_genai, dense": run_openvino_genai(arguments.dense, ids, arguments.new_tokens, []),
            "openvino_genai, SCAP": run_openvino_genai(fused, ids, arguments.new_tokens, [extension]),
        }
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(arguments.repeats + 1):  # the first one warms up
            for name, decode in runs.items():
                speed = decode()
                if repeat:
                    speeds[name].append(speed)
    for name, values in speeds.items():
        print(f"{name}: {Spread.of(values)} tokens/s")
    write(arguments.json, {"decode tokens/s": speeds})


if __name__ == "__main__":
    main()
