"""What callers bring as calibration data, read the same way for every backend. Knows no framework.

A dataset is text (strings, batches or rows of strings, a table with a column of them), a table of model inputs, or an
iterable of samples; a sample is inputs by name, inputs in order, or the one input.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np

from ..errors import SCAPError, printable


# What models of transformers read, where a model does not tell the names of its inputs.
_MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")
_FURTHER_INPUTS = (
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "pixel_attention_mask",
    "decoder_input_ids",
    "decoder_attention_mask",
)


def as_array(value: Any) -> np.ndarray:
    """Numbers of any kind (nested lists, tensors of torch or OpenVINO on any device) as a numpy array.

    Raises:
        ValueError, TypeError: if `value` is not made of numbers, or its rows are of different lengths.
    """
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # numpy has no bfloat16
        return value.float().numpy() if "bfloat16" in str(value.dtype) else value.numpy()
    if hasattr(value, "element_type") and hasattr(value, "data"):
        return np.asarray(value.data)
    return np.asarray(value)


def inputs_of(sample: Any) -> dict[str, Any] | list[Any]:
    """The inputs of a sample by name, or in order. Lists of numbers become arrays, with a batch dimension.

    Raises:
        SCAPError: if a list of numbers is no array.
    """
    if isinstance(sample, Mapping):
        return {name: _array_from_numbers(value) for name, value in sample.items()}
    if isinstance(sample, list | tuple) and not (sample and all(map(_is_number, sample))):
        return [_array_from_numbers(value) for value in sample]
    return [_array_from_numbers(sample)]


def describe_sample(sample: Any) -> str:
    """A sample for an error message: names, kinds and shapes."""
    if isinstance(sample, Mapping):
        return f"{{{', '.join(f'{name}: {describe_sample(value)}' for name, value in islice(sample.items(), 16))}}}"
    if isinstance(sample, list | tuple):
        return f"[{', '.join(map(describe_sample, sample[:4]))}{', ...' if len(sample) > 4 else ''}]"
    shape = getattr(sample, "shape", None)
    return type(sample).__name__ if shape is None else f"{type(sample).__name__}{list(shape)}"


def texts_or_samples(
    dataset: Any, num_samples: int, input_names: Collection[str] = ()
) -> tuple[Iterable[str] | None, Iterable[Any]]:
    """What an object given as dataset holds.

    Args:
        dataset: a `datasets.Dataset` (also a stream), an `nncf.Dataset`, strings, or an iterable of samples.
        num_samples: how many rows of a table of model inputs to read.
        input_names: the names of the model's inputs, empty if it does not tell.

    Returns:
        (documents, ()) for text, else (None, samples); samples can be iterated several times.

    Raises:
        SCAPError: if it is neither, saying what to pass.
    """
    if isinstance(dataset, Mapping) or hasattr(dataset, "keys") and hasattr(dataset, "columns"):
        names = printable(", ".join(map(str, islice(dataset, 16))))
        raise SCAPError(
            f"a {type(dataset).__name__} of {names or 'nothing'} is one sample or a dict of splits; pass a list of "
            "samples, or one split"
        )
    if hasattr(dataset, "column_names"):
        return _read_table(dataset, num_samples, input_names)
    if hasattr(dataset, "get_inference_data"):
        dataset = _Again(dataset.get_inference_data)
    try:
        iterator = iter(dataset)
    except TypeError:
        iterator = None
    if iterator is None or isinstance(dataset, bytes | bytearray):
        raise SCAPError(f"a dataset of type {type(dataset).__name__} cannot be iterated over")
    return _read_samples(dataset, iterator)


class _Again:
    """An iterable that starts anew every time, as nncf.Dataset gives it."""

    def __init__(self, start: Callable[[], Iterable[Any]]) -> None:
        self._start = start

    def __iter__(self) -> Iterator[Any]:
        return iter(self._start())


def _read_samples(dataset: Iterable[Any], iterator: Iterator[Any]) -> tuple[Iterable[str] | None, Iterable[Any]]:
    first = next((sample for sample in iterator if sample is not None), None)
    remaining = chain([] if first is None else [first], iterator)
    if _strings_in(first) is not None:
        return _documents(remaining), ()
    return None, list(remaining) if isinstance(dataset, Iterator) else dataset


def _documents(samples: Iterable[Any]) -> Iterator[str]:
    for number, sample in enumerate(samples):
        if sample is None:
            continue
        strings = _strings_in(sample)
        if strings is None:
            raise SCAPError(f"sample {number} of the dataset is no text ({describe_sample(sample)}), as others are")
        yield from strings


def _strings_in(sample: Any) -> list[str] | None:
    """The strings of which a sample is made; None if it is no text."""
    if isinstance(sample, str):
        return [sample]
    if isinstance(sample, list | tuple) and sample and all(isinstance(part, str) for part in sample):
        return list(sample)
    if isinstance(sample, Mapping) and all(map(_is_text_or_label, sample.values())):
        name = _text_column({name: _strings_in(value) is not None for name, value in sample.items()})
        return None if name is None else _strings_in(sample[name])
    return None


def _is_text_or_label(value: Any) -> bool:
    return value is None or _is_number(value) or _strings_in(value) is not None


def _text_column(is_text: Mapping[str, bool]) -> str | None:
    """`text` if it is a column of text, else the only one that is; None if that is not clear."""
    names = [name for name, text in is_text.items() if text]
    if "text" in names:
        return "text"
    return names[0] if len(names) == 1 else None


def _read_table(
    table: Any, num_samples: int, input_names: Collection[str]
) -> tuple[Iterable[str] | None, Iterable[Any]]:
    """A datasets.Dataset: rows of model inputs without a batch dimension, or a column of text."""
    first = next(iter(table), None)
    columns = list(table.column_names or first or ())  # a stream may not know its columns
    if first is None:
        raise SCAPError("the calibration dataset is empty: the table has no rows")
    known = input_names or (*_MAIN_INPUTS, *_FURTHER_INPUTS)
    kept = [name for name in columns if name in known and not isinstance(first.get(name), str)]
    if any(name not in (*_FURTHER_INPUTS, "labels", "label") for name in kept):
        return None, [_row_inputs(row, kept) for row in islice(table, num_samples)]
    # The first rows may have gaps.
    rows = list(islice(table, 100))
    text = _text_column({name: any(isinstance(row.get(name), str) for row in rows) for name in columns})
    if text is None:
        raise SCAPError(
            "the calibration dataset needs model inputs (input_ids, pixel_values, ...) or one column of text; its "
            f"columns are {printable(', '.join(columns))}"
        )
    return (row[text] for row in table if isinstance(row[text], str)), ()


def _row_inputs(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, np.ndarray]:
    inputs = {}
    for name in names:
        if row[name] is None:
            continue
        try:
            inputs[name] = _in_float32(row[name], as_array(row[name]))[None]
        except (TypeError, ValueError) as error:
            raise SCAPError(f"column {name} of the calibration dataset holds no arrays of numbers: {error}") from error
    return inputs


def _array_from_numbers(value: Any) -> Any:
    """Nested lists of numbers as an array `[batch, ...]`, anything else as it is."""
    leaf = value
    while isinstance(leaf, list | tuple) and leaf:
        leaf = leaf[0]
    if not isinstance(value, list | tuple) or not _is_number(leaf):
        return value
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise SCAPError(
            f"the calibration sample {describe_sample(value)} has rows of different lengths; pad them"
        ) from error
    array = _in_float32(value, array)
    return array[None] if array.ndim == 1 else array


def _in_float32(value: Any, array: np.ndarray) -> np.ndarray:
    """`array` of `value`: floats in lists have no type, and models take float32."""
    return array.astype(np.float32) if isinstance(value, list | tuple) and array.dtype == np.float64 else array


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number)
