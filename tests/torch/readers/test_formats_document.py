"""docs/formats.md says what the tests show, and no more."""

import re
from pathlib import Path

from test_damaged_quantized import CASES
from test_readers import KINDS

from optimum_scap.torch.readers import readers
from optimum_scap.torch.readers.gguf import EXACT_TYPES


DOCUMENT = (Path(__file__).parents[3] / "docs" / "formats.md").read_text(encoding="utf-8")


def rows(after: str) -> list[list[str]]:
    """The cells of the first table after some words."""
    found: list[list[str]] = []
    for line in DOCUMENT[DOCUMENT.index(after) :].splitlines():
        if line.startswith("|"):
            found.append([cell.strip() for cell in line.strip("|").split("|")])
        elif found:
            break
    return found[2:]


def test_every_line_is_a_checkpoint_that_is_tested() -> None:
    lines = {cells[0]: cells for cells in rows("What is read")}
    tested = set(KINDS) | {f"GGUF {kind}" for kind in EXACT_TYPES}
    assert {name for name in lines if not name.startswith("NNCF")} == tested
    for name, kind in KINDS.items():
        assert lines[name][2:] == [f"`int{kind.bits}`", "itself"]
    first_words = {name.split(" ")[0] for name in lines}
    assert first_words == {reader.name for reader in readers()}


def test_every_message_is_tested() -> None:
    messages = [message for _, _, _, message in CASES.values()]
    quoted = [text for cells in rows("## What is refused") for text in re.findall(r"`([^`]+)`", cells[1])]
    assert len(quoted) >= 10
    for text in quoted:
        assert any(text in message for message in messages), text
