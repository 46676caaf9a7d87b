"""Local text files, and names that could be files."""

import json
from pathlib import Path

import pytest

from optimum_scap import SCAPError
from optimum_scap.text import is_text_file, load_tokenizer, read_documents


TEXT = "A text of some words.\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.txt", TEXT.encode()),
        ("bom.txt", b"\xef\xbb\xbf" + TEXT.encode()),
        ("rows.jsonl", json.dumps({"text": TEXT}).encode()),
        ("other-columns.jsonl", json.dumps({"text": TEXT, "meta": {"page": 1}}).encode()),
        ("one-column.jsonl", json.dumps({"content": TEXT, "page": 1}).encode()),
        ("rows.json", json.dumps([{"text": TEXT}]).encode()),
        ("UPPER.TXT", TEXT.encode()),
    ],
)
def test_files(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_documents(tmp_path / name)) == [TEXT]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nested.jsonl", {"text": {"en": TEXT}}, r"found text \(nested\)"),
        ("numbers.jsonl", {"text": 5}, r"found text \(int64\)"),
        ("two.jsonl", {"a": TEXT, "b": TEXT}, r"found a \(string\), b \(string\)"),
    ],
)
def test_columns_that_hold_no_text(name: str, content: object, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(SCAPError, match=message):
        list(read_documents(tmp_path / name))


def test_an_empty_parquet_file_is_empty(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    assert list(read_documents(tmp_path / "empty.parquet")) == []


def test_names_of_datasets_are_not_shadowed_by_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("wikitext2", "c4"):
        Path(name).mkdir()
    Path("auto").write_text("not text")
    assert not any(map(is_text_file, ("auto", "wikitext2", "c4")))
    assert is_text_file("missing.txt")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    """transformers would make an empty one."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 8}))
    with pytest.raises(SCAPError, match="holds no tokenizer"):
        load_tokenizer(tmp_path, trust_remote_code=False)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SCAPError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path, trust_remote_code=False)
