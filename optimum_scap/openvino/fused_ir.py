"""What a fused IR says of itself. OpenVINO cannot read it without the compiled operations, so its XML is read here."""

from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

from ..errors import SCAPError


# Of the operations' opset, as OpenVINO writes it for every layer.
_OPSET_MARK = b'version="optimum_scap"'


def is_fused(path: Path) -> bool:
    """Whether the IR `path` holds the C++ operations (`optimum-cli scap fuse`)."""
    # The first of them may stand anywhere; OpenVINO reads the whole file too.
    return path.suffix == ".xml" and path.is_file() and _OPSET_MARK in path.read_bytes()


@dataclass(frozen=True)
class FusedIR:
    """What the XML of an IR tells without its weights.

    Attributes:
        parameters: the SCAP parameters as JSON, None if it carries none.
        precisions: those of its C++ operations.
    """

    parameters: str | None
    precisions: frozenset[str]


def read_fused_ir(path: Path) -> FusedIR:
    """Reads the XML of an IR.

    Raises:
        SCAPError: if the file cannot be read or is no IR.
    """
    reader = _Reader()
    parser = expat.ParserCreate()
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    # Entities exist in document types only, and an IR has none: nothing can be expanded.
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        with path.open("rb") as file:
            parser.ParseFile(file)
    except (OSError, ValueError, expat.ExpatError) as error:
        raise SCAPError(f"{path} cannot be read: {error}") from error
    return FusedIR(reader.parameters, frozenset(reader.precisions))


def readable(error: Exception, path: Path) -> Exception:
    """`error` of OpenVINO, in words, where it quotes what is no text in the damaged IR `path`.

    Such an error arrives as a UnicodeDecodeError, and on Python 3.11.2 and older as one that says nothing.
    """
    if isinstance(error, UnicodeDecodeError):
        return RuntimeError(error.object.decode(errors="replace"))
    if str(error):
        return error
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as found:
        around = content[max(0, found.start - 40) : found.end + 40].decode(errors="replace")
        return RuntimeError(f"{path.name} holds what is no text: {around}")
    return error


class _Reader:
    def __init__(self) -> None:
        self.parameters: str | None = None
        self.precisions: set[str] = set()
        self._path: list[str] = []
        self._in_operation = False

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._path.append(name)
        if name == "layer":
            self._in_operation = attributes.get("version") == "optimum_scap"
        elif name == "data" and self._in_operation:
            self.precisions.add(attributes.get("precision", "unknown"))
        elif self._path == ["net", "rt_info", "optimum_scap", "parameters"]:
            self.parameters = attributes.get("value")

    def end(self, name: str) -> None:
        self._path.pop()


def _refuse_doctype(*_: object) -> None:
    raise ValueError("it declares a document type, which an OpenVINO model never does")
