"""One line out of what other libraries raise, and interruptions that they turn into errors."""

import pytest
from pydantic import BaseModel, ValidationError

from optimum_scap.errors import first_line, interruption_behind, printable


OPENVINO = "Exception from src/inference/src/cpp/core.cpp:84:\n"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        # OpenVINO 2026.4, as it raises them
        (
            OPENVINO + "Exception from src/inference/src/model_reader.cpp:148:\n"
            'Unable to read the model: "m.xml" Please check the format.\nAvailable frontends: ir\n\n',
            'Unable to read the model: "m.xml" Please check the format.',
        ),
        (
            OPENVINO + "Check 'a || b' failed at src/frontends/common/src/frontend.cpp:117:\n"
            'FrontEnd API failed with GeneralFailure:\nir: Could not open the file: "none.xml"\n\n',
            'ir: Could not open the file: "none.xml"',
        ),
        (
            "Check 'merge(a, b)' failed at src/core/matmul.hpp:65:\nWhile validating node 'MatMul x' with "
            "friendly_name 'x':\nIncompatible MatMul matrix dimension. First input dimension=16\n",
            "Incompatible MatMul matrix dimension. First input dimension=16",
        ),
        # huggingface_hub, transformers, torch
        (
            "Validation error for field 'hidden_size':\n    TypeError: Field 'hidden_size' expected int, got str",
            "Validation error for field 'hidden_size': TypeError: Field 'hidden_size' expected int, got str",
        ),
        (
            "requires the protobuf library but it was not found. Check out the instructions on the\n"
            "installation page of its repo: https://github.com\n",
            "requires the protobuf library but it was not found.",
        ),
        (
            "We couldn't connect to 'https://huggingface.co', and couldn't find them in the cached files.\nCheck "
            "your internet connection.",
            "We couldn't connect to 'https://huggingface.co', and couldn't find them in the cached files.",
        ),
        (
            'Error(s) in loading state_dict for Linear:\n\tMissing key(s) in state_dict: "bias". \n\tsize mismatch',
            'Error(s) in loading state_dict for Linear: Missing key(s) in state_dict: "bias".',
        ),
        ("A:\nB:\nthe reason\nadvice", "A: B: the reason"),
        # pyarrow and safetensors say it in one line
        ("JSON parse error: Column(/a) changed in row 1", "JSON parse error: Column(/a) changed in row 1"),
        ("Error while deserializing header: header too large", "Error while deserializing header: header too large"),
        ("\n\n", "RuntimeError"),
        ("word", "RuntimeError: word"),
    ],
)
def test_the_reason_of_a_message(message: str, expected: str) -> None:
    assert first_line(RuntimeError(message)) == expected


def test_the_reason_of_a_key_error() -> None:
    assert first_line(KeyError("added_tokens")) == "KeyError: 'added_tokens'"


def test_the_reason_of_a_validation_error() -> None:
    class Fields(BaseModel):
        width: int

    with pytest.raises(ValidationError) as caught:
        Fields(width="wide")
    assert first_line(caught.value) == ("width: Input should be a valid integer, unable to parse string as an integer")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interruption_behind_an_error_is_found(interruption: BaseException) -> None:
    def import_error() -> type[Exception]:
        raise ImportError("requires the protobuf library")

    def as_transformers_does() -> None:
        try:
            raise interruption
        except import_error():
            pass

    with pytest.raises(ImportError) as caught:
        as_transformers_does()
    assert interruption_behind(caught.value) is interruption
    wrapped = ValueError("no tokenizer")
    wrapped.__cause__ = caught.value
    assert interruption_behind(wrapped) is interruption


def test_other_errors_hide_no_interruption() -> None:
    error = ValueError("a")
    error.__context__ = RuntimeError("b")
    error.__context__.__context__ = error  # a cycle ends too
    assert interruption_behind(error) is None


def test_names_from_files_fit_on_one_line() -> None:
    assert printable("model.layers.0") == "model.layers.0"
    assert printable("Bücher/本.txt") == "Bücher/本.txt"
    assert printable("a\nb\x1b[31m\ud800") == r"a\nb\x1b[31m\ud800"
    assert printable("x" * 1000) == "x" * 200 + "..."
