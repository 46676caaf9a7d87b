"""Calibration and evaluation text from local files, cut into windows of tokens."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import SCAPError, first_line


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

# Characters read per token wanted; a token of any usual vocabulary is shorter, and the rest lets windows spread out.
_CHARACTERS_PER_TOKEN = 32


def is_text_file(name: str) -> bool:
    """Whether `name` means a local file rather than the name of a dataset, which a folder may happen to share."""
    return Path(name).suffix.lower() in SUFFIXES or Path(name).is_file() and name != "auto"


def read_documents(path: str | Path) -> Iterator[str]:
    """The documents of a local .txt (one document), .jsonl, .json or .parquet file (one per row).

    Raises:
        SCAPError: naming the file, if it is missing, unreadable, or has no text column.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise SCAPError(f"dataset file {path} does not exist or is not a file")
    if suffix not in SUFFIXES:
        raise SCAPError(f"dataset file {path}: unknown kind {suffix or '(no suffix)'}, use {', '.join(SUFFIXES)}")
    try:
        if path.stat().st_size == 0:
            return
        if suffix == ".txt":
            documents: Any = [path.read_text(encoding="utf-8-sig")]
        else:
            documents = _read_column(path, suffix)
    except SCAPError:
        raise
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise SCAPError(f"dataset file {path} cannot be read: {first_line(error)}") from error
    yield from documents


def _read_column(path: Path, suffix: str) -> list[Any]:
    """The text column of a table: `text` if there is one, else the only column of strings."""
    from datasets import Dataset, Value, disable_progress_bars
    from datasets.exceptions import DatasetGenerationError
    from datasets.utils import logging as datasets_logging
    from pyarrow.parquet import ParquetFile

    disable_progress_bars()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)  # what goes wrong is raised, with the name of the file
    read = Dataset.from_parquet if suffix == ".parquet" else Dataset.from_json
    if suffix == ".parquet" and ParquetFile(path).metadata.num_rows == 0:  # which datasets cannot read
        return []
    with tempfile.TemporaryDirectory() as cache:
        try:
            table = read(str(path), cache_dir=cache, keep_in_memory=True)
        except DatasetGenerationError as error:
            raise ValueError(first_line(error.__cause__ or error)) from error
        strings = [
            name
            for name, feature in table.features.items()
            if isinstance(feature, Value) and feature.dtype in ("string", "large_string")
        ]
        if "text" in strings:
            strings = ["text"]
        if len(strings) != 1:
            kinds = {name: getattr(feature, "dtype", "nested") for name, feature in table.features.items()}
            raise SCAPError(
                f"dataset file {path}: expected a column of strings called 'text', found "
                f"{', '.join(f'{name} ({kind})' for name, kind in kinds.items()) or 'no column'}"
            )
        return list(table[strings[0]])


def load_tokenizer(source: Any, trust_remote_code: bool) -> Any:
    """`source` if it is a tokenizer, else the one that is there.

    Raises:
        SCAPError: if none can be loaded.
    """
    from transformers import AutoTokenizer

    if not isinstance(source, str | Path):
        return source
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except Exception as error:  # what broken files and missing libraries raise is anybody's guess
        raise SCAPError(f"no tokenizer could be loaded from {source}: {first_line(error)}") from error
    # Without any file transformers makes an empty tokenizer of the kind that config.json names.
    files = {"tokenizer.json", *getattr(tokenizer, "vocab_files_names", {}).values()}
    if Path(source).is_dir() and len(files) > 1 and not any((Path(source) / name).exists() for name in files):
        raise SCAPError(f"model folder {source} holds no tokenizer ({', '.join(sorted(files))})")
    return tokenizer


def token_windows(
    path: str | Path, tokenizer: "PreTrainedTokenizerBase", num_samples: int, seq_len: int
) -> list[dict[str, list[int]]]:
    """`num_samples` windows of `seq_len` tokens, spread evenly over the beginning of a local file.

    Args:
        path: see `read_documents`; documents are joined by blank lines.
        tokenizer: adds its special tokens to every window.
        num_samples: how many windows; fewer are returned if the file is too small for so many.
        seq_len: tokens per window, special tokens included.

    Returns:
        Tokenizer outputs (`input_ids`, `attention_mask`, ...), each `seq_len` long.

    Raises:
        SCAPError: if the file cannot be read, is empty, or holds less than one window.
    """
    return cut_into_windows(read_documents(path), tokenizer, num_samples, seq_len, f"dataset file {path}")


def cut_into_windows(
    documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase", num_samples: int, seq_len: int, source: str
) -> list[dict[str, list[int]]]:
    """`num_samples` windows of `seq_len` tokens, spread evenly over the first `documents`; see `token_windows`.

    `source` says in error messages where the documents are from.
    """
    wanted = num_samples * seq_len * _CHARACTERS_PER_TOKEN
    pieces: list[str] = []
    length = 0
    for document in documents:
        if not isinstance(document, str) or not document.strip():
            continue
        pieces.append(document[: wanted - length])
        length += len(pieces[-1]) + 2
        if length >= wanted:
            break
    if not pieces:
        raise SCAPError(f"{source} is empty: it holds no text")
    windows = _windows("\n\n".join(pieces), tokenizer, seq_len)
    if not windows:
        raise SCAPError(
            f"{source} is too short: it holds less than one sample of {seq_len} tokens; give more text or "
            "ask for shorter samples"
        )
    count = min(num_samples, len(windows))
    return [windows[index * len(windows) // count] for index in range(count)]


def _windows(text: str, tokenizer: "PreTrainedTokenizerBase", seq_len: int) -> list[dict[str, list[int]]]:
    if tokenizer.is_fast:
        batch = tokenizer(text, truncation=True, max_length=seq_len, return_overflowing_tokens=True)
        names = [name for name in batch if name != "overflow_to_sample_mapping"]
        windows = [{name: batch[name][index] for name in names} for index in range(len(batch["input_ids"]))]
    else:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        chunks = [ids[start : start + seq_len] for start in range(0, len(ids), seq_len)]
        windows = [{"input_ids": chunk, "attention_mask": [1] * len(chunk)} for chunk in chunks]
    return [window for window in windows if len(window["input_ids"]) == seq_len]
