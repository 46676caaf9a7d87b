"""Local text files, and names that could be files."""

import json
from itertools import islice
from pathlib import Path

import pytest

from optimum_scap import SCAPError
from optimum_scap.data.text import is_text_file, load_tokenizer, read_documents


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


ODD_NAMES = ("my [data] v1", "x::y", "a*b?", "50%", "a#b", "-f", "~", "hf:", "Bücher 本", "{0}", "a\nb", "$HOME")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_are_taken_as_they_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    monkeypatch.chdir(tmp_path)
    folder = Path(name)
    folder.mkdir()
    for suffix in (".jsonl", ".json", ".txt"):
        (folder / f"{name}{suffix}").write_text(TEXT if suffix == ".txt" else json.dumps({"text": TEXT}))
    with (folder / f"{name}.parquet").open("wb") as file:  # pyarrow too reads more into names
        parquet.write_table(pa.table({"text": [TEXT]}), file)
    for suffix in (".jsonl", ".json", ".txt", ".parquet"):
        path = f"{name}/{name}{suffix}"
        assert is_text_file(path)
        assert list(read_documents(path)) == [TEXT]
        with pytest.raises(SCAPError, match="does not exist or is not a file") as caught:
            list(read_documents(f"{path}{suffix}"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["hf://datasets/x/y.jsonl", "http://host/a.parquet", "x" * 5000 + ".txt", "a\0b.txt"])
def test_names_that_no_file_has(name: str) -> None:
    assert is_text_file(name)
    with pytest.raises(SCAPError, match="does not exist or is not a file"):
        list(read_documents(name))
    assert not is_text_file("y" * 5000)


ROWS = [{"text": f"line {number}", "page": number} for number in range(1000)]
DOCUMENTS = [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("blank-lines.jsonl", "\r\n \r\n".join(map(json.dumps, ROWS)) + "\n\n"),
        ("lines.json", "\n".join(map(json.dumps, ROWS))),
        ("array.json", json.dumps(ROWS)),
        ("indented.json", json.dumps(ROWS, indent=4)),
        ("array.jsonl", " \n" + json.dumps(ROWS)),
        ("strings.json", json.dumps(DOCUMENTS)),
        ("strings.jsonl", "\n".join(map(json.dumps, DOCUMENTS))),
        ("columns.json", json.dumps({"text": DOCUMENTS, "page": list(range(1000))}, indent=1)),
        ("gaps.jsonl", "\n".join(map(json.dumps, [{"text": None}, {"page": 3}, *ROWS]))),
        ("changing.jsonl", "\n".join(json.dumps({**row, "meta": [{}, 1, None][i % 3]}) for i, row in enumerate(ROWS))),
        ("long.json", json.dumps([*ROWS, {"text": "x" * 300_000}])),
    ],
)
def test_every_way_to_write_rows(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, newline="")
    assert [text for text in read_documents(tmp_path / name) if len(text) < 100] == DOCUMENTS


def test_every_kind_of_string_column(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    strings = pa.array([*DOCUMENTS, None])
    for name, column in {
        "string": strings,
        "large_string": strings.cast(pa.large_string()),
        "dictionary": strings.dictionary_encode(),
    }.items():
        others = {"page": pa.array(range(1001)), "nested": pa.array([{"text": 1}] * 1001)}
        for column_name in ("text", "my.text"):
            parquet.write_table(pa.table({**others, column_name: column}), tmp_path / f"{name}.parquet")
            assert list(read_documents(tmp_path / f"{name}.parquet")) == DOCUMENTS
    parquet.write_table(pa.table({"text": pa.array([1, 2])}), tmp_path / "numbers.parquet")
    with pytest.raises(SCAPError, match=r"numbers.parquet: expected a column of .* found text \(int64\)$"):
        list(read_documents(tmp_path / "numbers.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            "\n".join(map(json.dumps, ROWS)) + '\n{"text": "unfinished',
            "cannot be read: row 1001: Unterminated",
        ),
        ("a.json", json.dumps(ROWS)[:-1], "cannot be read: expected ',' or|cannot be read: Expecting value"),
        ("a.json", json.dumps(ROWS) + "x", "cannot be read: there is something behind the end"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', "cannot be read: expected ',' or"),
        ("a.json", '[{"text": "a"},]', "cannot be read: Expecting value"),
        ("a.json", '{"text": ["a"], "b": []}', "cannot be read: its columns are of different lengths"),
        ("a.jsonl", '{"text": "a"}\n{"text": 5}', "row 2: text is int64, not a string"),
        ("a.jsonl", '{"text": "a"}\n5', "row 2 is int64, not an object"),
        ("a.jsonl", "{}", "expected a column of strings called 'text', found no column"),
        ("a.jsonl", "[" * 100_000, "cannot be read: "),
        ("a.jsonl", '{"a": ' * 100_000, "cannot be read: "),
        ("a.jsonl", '{"text": ' + "9" * 10_000 + "}", "cannot be read: "),
        ("a.parquet", "PAR1" + "x" * 100 + "PAR1", "cannot be read: "),
    ],
)
def test_damaged_rows(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SCAPError, match=message) as caught:
        list(read_documents(tmp_path / name))
    assert str(caught.value).startswith(f"dataset file {tmp_path / name}")
    assert "\n" not in str(caught.value)


def test_files_are_read_as_far_as_they_are_needed(tmp_path: Path) -> None:
    """What stands behind the first rows is damaged, and does not matter to whoever needs no more."""
    import pyarrow as pa
    from pyarrow import parquet

    lines = "\n".join(map(json.dumps, ROWS))
    (tmp_path / "a.jsonl").write_text(lines + "\n{")
    (tmp_path / "b.json").write_text(json.dumps(ROWS * 100)[:-1])
    parquet.write_table(pa.table({"text": ["x" * 1000] * 5000}), tmp_path / "c.parquet", row_group_size=500)
    for name, first in (("a.jsonl", DOCUMENTS[:3]), ("b.json", DOCUMENTS[:3]), ("c.parquet", ["x" * 1000] * 3)):
        assert list(islice(read_documents(tmp_path / name), 3)) == first
    (tmp_path / "d.txt").write_bytes(TEXT.encode() * 10 + b" " * 2**20 + b"\xff")
    assert list(read_documents(tmp_path / "d.txt", len(TEXT))) == [TEXT]


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


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interruption_while_a_tokenizer_loads_is_one(
    interruption: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import transformers

    def load(*_arguments: object, **_options: object) -> None:
        try:
            raise interruption
        finally:
            raise ImportError("requires the protobuf library")  # as transformers does

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    with pytest.raises(type(interruption)) as caught:
        load_tokenizer(tmp_path, trust_remote_code=False)
    assert caught.value is interruption
