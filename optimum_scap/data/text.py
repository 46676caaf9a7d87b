"""Calibration and evaluation text from local files, cut into windows of tokens."""

import io
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.config import SCAPConfig
from ..errors import SCAPError, first_line, printable, raise_interruption_behind
from .lengths import longest_sequence


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

# Characters read per token wanted; a token of any usual vocabulary is shorter, and the rest lets windows spread out.
_CHARACTERS_PER_TOKEN = 32
_GENERATED_TOKENS = 32
_ROWS_AT_ONCE = 256
_CHARACTERS_AT_ONCE = 1 << 16


def is_text_file(name: str) -> bool:
    """Whether `name` means a local file rather than the name of a dataset, which a folder may happen to share."""
    return Path(name).suffix.lower() in SUFFIXES or _is_file(Path(name)) and name != "auto"


def check_text_file(name: str) -> None:
    """Checks that the local file `name` exists.

    Raises:
        SCAPError: otherwise.
    """
    if not _is_file(Path(name)):
        raise SCAPError(f"dataset file {printable(name, 1000)} does not exist or is not a file")


def read_documents(path: str | Path, characters: int | None = None) -> Iterator[str]:
    """The documents of a local .txt (one document), .jsonl, .json or .parquet file (one per row).

    They are read as they are asked for. The file is opened by its name as it is: brackets, `*`, `::` and `~` mean
    nothing in it.

    Args:
        path: the file.
        characters: how much of a .txt file to read; all of it by default.

    Raises:
        SCAPError: naming the file, if it is missing, unreadable, or has no text column.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    check_text_file(str(path))
    name = printable(str(path), 1000)
    if suffix not in SUFFIXES:
        raise SCAPError(f"dataset file {name}: unknown kind {suffix or '(no suffix)'}, use {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return
            if suffix == ".parquet":
                yield from _read_parquet(file)
            else:
                text = io.TextIOWrapper(file, encoding="utf-8-sig")
                yield from [text.read(characters)] if suffix == ".txt" else _read_json(text)
    except SCAPError as error:
        raise SCAPError(f"dataset file {name}: {error}") from error
    # pyarrow's exceptions are of these kinds too; nesting without end is a RecursionError
    except (OSError, UnicodeDecodeError, ValueError, RecursionError, NotImplementedError) as error:
        raise SCAPError(f"dataset file {name} cannot be read: {first_line(error)}") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _read_parquet(file: Any) -> Iterator[str]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        schema = table.schema_arrow
        name = _text_column({field.name: _kind_of_column(pa, field.type) for field in schema})
        # A dot would mean a path into nested columns.
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=None if "." in name else [name]):
            column = batch.column(batch.schema.names.index(name))
            yield from (value for value in column.to_pylist() if value is not None)


def _kind_of_column(pa: Any, kind: Any) -> str:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "string"
    return "nested" if pa.types.is_nested(kind) else str(kind)


def _read_json(file: Any) -> Iterator[str]:
    """The text of JSON Lines, of an array of rows, or of one object whose values are columns or make one row."""
    rows = _json_rows(file)
    first = list(islice(rows, _ROWS_AT_ONCE))
    kinds: dict[str, str] = {}
    for number, row in enumerate(first, 1):
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            raise SCAPError(f"row {number} is {_kind_of_value(row)}, not an object")
        for name, value in row.items():
            if kinds.get(name, "null") in ("null", "nested") or isinstance(value, str):
                kinds[name] = _kind_of_value(value) if value is not None else kinds.get(name, "null")
    if not kinds and first:
        raise SCAPError("expected a column of strings called 'text', found no column")
    text = _text_column(kinds) if first else "text"
    for number, row in enumerate(chain(first, rows), 1):
        value = row if isinstance(row, str) else row.get(text) if isinstance(row, dict) else row
        if isinstance(value, str):
            yield value
        elif value is not None:
            raise SCAPError(f"row {number}: {printable(text)} is {_kind_of_value(value)}, not a string")


def _json_rows(file: Any) -> Iterator[Any]:
    start = file.read(1)
    while start and start.isspace():
        start = file.read(1)
    if start == "[":
        yield from _json_array(file)
        return
    line = start + file.readline()
    try:
        first = json.loads(line)
    except ValueError:  # one object over many lines, or not JSON
        yield from _rows_of_object(json.loads(line + file.read()))
        return
    following = next(_filled_lines(file), None)
    if following is None:
        yield from _rows_of_object(first)
        return
    yield first
    for number, line in enumerate(chain([following], _filled_lines(file)), 2):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"row {number}: {first_line(error)}") from error


def _filled_lines(file: Any) -> Iterator[str]:
    return (line for line in file if not line.isspace())


def _rows_of_object(content: Any) -> Iterator[Any]:
    columns = content if isinstance(content, dict) else {}
    if not columns or not all(isinstance(value, list) for value in columns.values()):
        yield content
    elif len({len(value) for value in columns.values()}) > 1:
        raise ValueError("its columns are of different lengths")
    else:
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def _json_array(file: Any) -> Iterator[Any]:
    """The elements of an array whose bracket has been read, one at a time."""
    decoder, text, end, separator = json.JSONDecoder(), "", False, ""
    while True:
        text = text.lstrip()
        if text.startswith("]"):
            if (text[1:] + file.read()).strip():
                raise ValueError("there is something behind the end of the array")
            return
        try:
            if text and not text.startswith(separator):
                raise ValueError(f"expected {separator!r} or ']' behind an element of the array")
            value, stop = decoder.raw_decode(text.removeprefix(separator).lstrip())
            rest = text.removeprefix(separator).lstrip()[stop:]
        except ValueError:
            if end or text and not text.startswith(separator):
                raise
            rest = ""
        if rest or end:  # a number at the end of what has been read may go on
            yield value
            text, separator = rest, ","
        else:
            more = file.read(max(_CHARACTERS_AT_ONCE, len(text)))
            text, end = text + more, not more


def _kind_of_value(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    kinds: dict[type, str] = {str: "string", int: "int64", float: "double", dict: "nested", list: "nested"}
    return kinds.get(type(value), "null")


def _text_column(kinds: Mapping[str, str]) -> str:
    """`text` if it is a column of strings, else the only column of strings."""
    strings = [name for name, kind in kinds.items() if kind == "string"]
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        found = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise SCAPError(f"expected a column of strings called 'text', found {printable(found) or 'no column'}")
    return strings[0]


def load_tokenizer(source: Any, trust_remote_code: bool) -> Any:
    """`source` if it is a tokenizer, else the one that is there.

    Raises:
        SCAPError: if none can be loaded, or `source` is None or empty.
    """
    from transformers import AutoTokenizer

    if source is None or source == "":
        raise SCAPError("the dataset is text, and the model does not say where its tokenizer is: pass tokenizer=")
    if not isinstance(source, str | Path):
        return source
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except Exception as error:  # what broken files and missing libraries raise is anybody's guess
        raise_interruption_behind(error)
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
        num_samples: how many windows; fewer are returned, with a warning, if the file is too small for so many.
        seq_len: tokens per window, special tokens included.

    Returns:
        Tokenizer outputs (`input_ids`, `attention_mask`, ...), each `seq_len` long.

    Raises:
        SCAPError: if the file cannot be read, is empty, or holds less than one window.
    """
    documents = read_documents(path, num_samples * seq_len * _CHARACTERS_PER_TOKEN)
    source = f"dataset file {printable(str(path), 1000)}"
    return cut_into_windows(documents, tokenizer, num_samples, seq_len, source)


def check_dataset_name(name: str, known: Collection[str]) -> None:
    """Checks that `name` is `auto`, an existing file, or one of the data sets `known` by name.

    Raises:
        SCAPError: otherwise, listing what can be used.
    """
    if is_text_file(name):
        check_text_file(name)
    elif name != "auto" and name.partition(":")[0] not in known:
        raise SCAPError(
            f"dataset {printable(name)!r} is neither a file nor a name that optimum knows; use auto, a "
            f".txt, .jsonl, .json or .parquet file, or one of {', '.join(known)}"
        )


def generated_samples(model: Any, tokenizer: Any, config: SCAPConfig) -> list[dict[str, list[int]]]:
    """The dataset `auto`: texts that `model` writes itself, as tokenizer outputs, each of its own length.

    Args:
        model: a model of transformers or optimum-intel that generates text.
        tokenizer: its tokenizer.
        config: number and seed of the samples.

    Raises:
        SCAPError: if nncf is missing or the model does not generate text.
    """
    try:
        from nncf.data import generate_text_data
    except ImportError as error:
        raise SCAPError(
            "dataset auto (text that the model generates) needs nncf: pip install nncf, or use a .txt, .jsonl, "
            ".json or .parquet file"
        ) from error
    from transformers import GenerationMixin, set_seed

    if not isinstance(model, GenerationMixin):
        raise SCAPError(
            f"dataset auto needs a model that generates text, a {type(model).__name__} does not; use a local .txt, "
            ".jsonl, .json or .parquet file, or pass a dataset of model inputs"
        )
    longest = longest_sequence(getattr(model, "config", None), tokenizer)
    # It starts with half as many tokens and writes up to one and a half times as many.
    length = _GENERATED_TOKENS if longest is None else max(2, min(_GENERATED_TOKENS, longest * 2 // 3))
    set_seed(config.seed % 2**32)
    try:
        texts = generate_text_data(model, tokenizer, seq_len=length, dataset_size=config.num_samples)
    except Exception as error:  # models of every kind run in there
        raise_interruption_behind(error)
        raise SCAPError(
            f"dataset auto: a {type(model).__name__} could not write text: {first_line(error)}; use a local .txt, "
            ".jsonl, .json or .parquet file, or pass a dataset of model inputs"
        ) from error
    return [dict(tokenizer(text, truncation=longest is not None, max_length=longest)) for text in texts]


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
    if count < num_samples:
        logger.warning(
            "%s holds only %d samples of %d tokens, %d were asked for; calibrating on those",
            source,
            count,
            seq_len,
            num_samples,
        )
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
