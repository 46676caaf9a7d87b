"""Everything that may be given as dataset, on both backends alike."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import pandas
import pytest
import torch
import transformers as tf
from datasets import Dataset, DatasetDict, IterableDataset
from optimum.intel import OVModelForCausalLM, OVModelForMaskedLM
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer, words
from torch.utils.data import DataLoader

from optimum_scap import SCAPConfig, SCAPError, sparsify_activations
from optimum_scap.data.named import with_length
from optimum_scap.openvino import dataset as openvino_dataset
from optimum_scap.openvino.dataset import build_samples as build_openvino_samples
from optimum_scap.torch.dataset import build_samples as build_torch_samples


CONFIG = SCAPConfig.from_spec("0.4", num_samples=4, seq_len=16)
DOCUMENTS = [words(number, 20) for number in range(6)]


@pytest.fixture(scope="module")
def openvino_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return OVModelForCausalLM.from_pretrained(folder, export=True, compile=False)


def both(model: Any, dataset: Any, config: SCAPConfig = CONFIG) -> tuple[list[Any], list[Any]]:
    """The samples for PyTorch and for OpenVINO; `dataset` makes the dataset anew."""
    tokenizer = tiny_tokenizer()
    samples = build_torch_samples(tiny_model("llama"), config, dataset(), tokenizer)
    return list(samples), build_openvino_samples(model, config, dataset(), tokenizer)["model"]


def stream() -> Iterator[dict[str, Any]]:
    yield from ({"text": text, "label": 1} for text in [None, *DOCUMENTS])


TEXTS: dict[str, Any] = {
    "list": lambda: DOCUMENTS,
    "gaps": lambda: [None, "", *DOCUMENTS, None],
    "tuple": lambda: tuple(DOCUMENTS),
    "generator": lambda: (text for text in DOCUMENTS),
    "endless generator": lambda: (DOCUMENTS[number % 6] for number in range(10**9)),
    "rows": lambda: [{"text": text, "label": number} for number, text in enumerate(DOCUMENTS)],
    "column": lambda: Dataset.from_dict({"body": DOCUMENTS})["body"],
    "table": lambda: Dataset.from_dict({"text": DOCUMENTS, "title": ["a"] * 6}),
    "table with gaps": lambda: Dataset.from_dict({"body": [None, *DOCUMENTS], "label": list(range(7))}),
    "stream": lambda: IterableDataset.from_generator(stream),
    "nncf": lambda: nncf.Dataset(DOCUMENTS),
    "loader": lambda: DataLoader(DOCUMENTS, batch_size=2),
    "loader of rows": lambda: DataLoader(Dataset.from_dict({"text": DOCUMENTS}), batch_size=2),
    "array": lambda: np.array(DOCUMENTS),
    "series": lambda: pandas.Series(DOCUMENTS),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_text_is_cut_into_windows(kind: str, openvino_model: Any) -> None:
    expected = tiny_tokenizer()("\n\n".join(DOCUMENTS))["input_ids"][:64]
    torch_samples, openvino_samples = both(openvino_model, TEXTS[kind])
    ids = [sample["input_ids"].tolist() for sample in torch_samples]
    assert [len(row) for sample in ids for row in sample] == [16] * 4
    assert ids[0] == [expected[:16]]
    assert [sample["input_ids"].tolist() for sample in openvino_samples] == ids
    names = {port.get_any_name() for port in openvino_model.model.inputs}
    assert all(sample.keys() >= names for sample in openvino_samples)


IDS = [np.arange(3 + number, 15 + number)[None] for number in range(4)]
INPUTS: dict[str, Any] = {
    "BatchEncoding": lambda: [tf.BatchEncoding({"input_ids": ids}, tensor_type="pt") for ids in IDS],
    "what a tokenizer returns": lambda: [tiny_tokenizer()(" ".join(f"w{i}" for i in ids[0])) for ids in IDS],
    "dicts of tensors": lambda: [{"input_ids": torch.from_numpy(ids)} for ids in IDS],
    "dicts of arrays": lambda: [{"input_ids": ids, "attention_mask": None} for ids in IDS],
    "dicts of lists": lambda: [{"input_ids": ids.tolist(), "attention_mask": [[1] * 12]} for ids in IDS],
    "bool masks": lambda: [{"input_ids": ids, "attention_mask": np.ones((1, 12), dtype=bool)} for ids in IDS],
    "tuples": lambda: [(torch.from_numpy(ids), torch.ones(1, 12, dtype=torch.long)) for ids in IDS],
    "one input": lambda: [(ids,) for ids in IDS],
    "tensors": lambda: [torch.from_numpy(ids) for ids in IDS],
    "lists of numbers": lambda: [ids[0].tolist() for ids in IDS],
    "generator": lambda: ({"input_ids": ids} for ids in IDS),
    "nncf": lambda: nncf.Dataset(IDS, lambda ids: {"input_ids": ids}),
    "loader": lambda: DataLoader(torch.from_numpy(np.concatenate(IDS))),
    "table": lambda: Dataset.from_dict({"input_ids": [ids[0].tolist() for ids in IDS], "label": [0] * 4}),
    "table of tensors": lambda: Dataset.from_dict({"input_ids": [ids[0] for ids in IDS]}).with_format("torch"),
    "stream": lambda: IterableDataset.from_generator(lambda: iter([{"input_ids": ids[0].tolist()} for ids in IDS])),
    "longer table": lambda: Dataset.from_dict({"input_ids": [ids[0].tolist() for ids in IDS * 3]}),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_model_inputs(kind: str, openvino_model: Any) -> None:
    torch_samples, openvino_samples = both(openvino_model, INPUTS[kind])
    model = tiny_model("llama")
    sparsify_activations(model, "0.4", torch_samples)
    assert len(torch_samples) == len(openvino_samples) == 4
    for ids, sample in zip(IDS, openvino_samples, strict=True):
        assert np.asarray(sample["input_ids"]).tolist() == ids.tolist()
        assert np.asarray(sample["attention_mask"]).tolist() == [[1] * 12]
        assert np.asarray(sample["position_ids"]).tolist() == [list(range(12))]


REFUSED: dict[str, tuple[Any, str]] = {
    "one sample": (lambda: {"input_ids": IDS[0]}, "a dict of input_ids is one sample or a dict of splits"),
    "splits": (
        lambda: DatasetDict({"train": Dataset.from_dict({"text": ["a"]})}),
        "a DatasetDict of train is one sample or a dict of splits; pass a list of samples, or one split",
    ),
    "frame": (lambda: pandas.DataFrame({"text": DOCUMENTS}), "a DataFrame of text is one sample"),
    "number": (lambda: 5, "a dataset of type int cannot be iterated over"),
    "bytes": (lambda: b"text", "a dataset of type bytes cannot be iterated over"),
    "no rows": (lambda: Dataset.from_dict({"text": []}), "the calibration dataset is empty"),
    "no columns": (lambda: Dataset.from_dict({}), "the calibration dataset is empty"),
    "empty stream": (lambda: IterableDataset.from_generator(lambda: iter([])), "the calibration dataset is empty"),
    "blank": (lambda: ["", " \n"], "the calibration dataset is empty: it holds no text"),
    "short": (lambda: ["w3 w4"], "the calibration dataset is too short"),
    "labels": (lambda: Dataset.from_dict({"label": [1]}), "needs model inputs .* its columns are label"),
    "two texts": (lambda: Dataset.from_dict({"a": ["x"], "b": ["y"]}), "one column of text; its columns are a, b"),
    "mixed": (lambda: [DOCUMENTS[0], {"input_ids": IDS[0]}], "sample 1 of the dataset is no text .{input_ids: nd"),
    "ragged": (lambda: [{"input_ids": [[3, 4], [5]]}], "has rows of different lengths; pad them"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_dataset(kind: str, openvino_model: Any) -> None:
    data, message = REFUSED[kind]
    with pytest.raises(SCAPError, match=message):
        sparsify_activations(tiny_model("llama"), CONFIG, data(), tokenizer=tiny_tokenizer())
    with pytest.raises(SCAPError, match=message):
        build_openvino_samples(openvino_model, CONFIG, data(), tiny_tokenizer())


@pytest.mark.parametrize("empty", [list, tuple, lambda: iter(()), lambda: nncf.Dataset([]), lambda: DataLoader([])])
def test_empty_datasets(empty: Any, openvino_model: Any) -> None:
    with pytest.raises(SCAPError, match="the calibration dataset is empty"):
        sparsify_activations(tiny_model("llama"), CONFIG, empty())
    with pytest.raises(SCAPError, match="the calibration dataset is empty"):
        build_openvino_samples(openvino_model, CONFIG, empty(), tiny_tokenizer())


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(SCAPError, match="the model does not say where its tokenizer is: pass tokenizer="):
        sparsify_activations(tiny_model("llama"), CONFIG, DOCUMENTS)


@pytest.mark.parametrize("dataset", [None, "auto", Path("a.txt"), DOCUMENTS, Dataset.from_dict({"text": ["a"]})])
def test_an_openvino_model_has_no_tokenizer(dataset: Any, openvino_model: Any) -> None:
    with pytest.raises(SCAPError, match=r"an openvino\.Model has no tokenizer: pass a dataset of model inputs"):
        sparsify_activations(openvino_model.model, CONFIG, dataset)


def test_an_openvino_model_reads_a_table() -> None:
    from synthetic import gated_ffn, samples

    from optimum_scap.openvino.backend import read_parameters

    data = samples()
    table = Dataset.from_dict({"x": [sample["x"][0].tolist() for sample in data], "label": [0] * len(data)})
    found = [
        read_parameters(sparsify_activations(gated_ffn(), "0.5", dataset)) for dataset in (table, data, iter(data))
    ]
    assert found[0] == found[1] == found[2]
    with pytest.raises(SCAPError, match="a dict of x is one sample"):
        sparsify_activations(gated_ffn(), "0.5", data[0])


def test_long_samples_are_cut_to_what_the_model_takes(openvino_model: Any, tmp_path: Path) -> None:
    """tiny_models' Llama has 256 positions."""
    config = SCAPConfig.from_spec("0.4", num_samples=2, seq_len=1000)
    for data in ([words(0, 1000)], str(tmp_path / "a.txt")):
        (tmp_path / "a.txt").write_text(words(0, 1000))
        torch_samples, openvino_samples = both(openvino_model, lambda data=data: data, config)
        assert [sample["input_ids"].shape for sample in (*torch_samples, *openvino_samples)] == [(1, 256)] * 4


SMALL = {"vocab_size": 128, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
# The exporter of optimum-intel traces with 32 tokens.
LIMITED: dict[str, Any] = {
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SMALL, intermediate_size=32, max_position_embeddings=40)),
    "roberta": lambda: tf.RobertaForMaskedLM(
        tf.RobertaConfig(**SMALL, intermediate_size=32, max_position_embeddings=42)
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**SMALL, ffn_dim=32, max_position_embeddings=40, word_embed_proj_dim=16)
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=128, n_embd=16, n_layer=1, n_head=2, n_positions=40)),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(vocab_size=128, d_model=16, n_layers=1, n_heads=2, max_seq_len=40)),
}


@pytest.mark.parametrize("name", LIMITED)
def test_calibration_on_the_longest_samples_that_a_model_takes(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(0, 400))
    model, config = LIMITED[name]().eval(), SCAPConfig.from_spec("0.4", num_samples=4)
    samples = build_torch_samples(model, config, str(tmp_path / "a.txt"), tiny_tokenizer())
    assert [sample["input_ids"].shape for sample in samples] == [(1, 40)] * 4
    sparsify_activations(model, config, str(tmp_path / "a.txt"), tokenizer=tiny_tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize("name", LIMITED)
def test_the_same_for_openvino(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(words(0, 400))
    LIMITED[name]().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    cls = OVModelForMaskedLM if "bert" in name else OVModelForCausalLM
    model, config = cls.from_pretrained(tmp_path / "model", export=True, compile=False), CONFIG
    samples = build_openvino_samples(model, config.model_copy(update={"seq_len": 256}), str(tmp_path / "a.txt"))
    assert [np.asarray(sample["input_ids"]).shape for sample in samples["model"]] == [(1, 40)] * 4
    sparsify_activations(model, config.model_copy(update={"seq_len": 256}), str(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wikitext2", "wikitext2:seq_len=40"),
        ("wikitext2:seq_len=1000", "wikitext2:seq_len=40"),
        ("wikitext2:seq_len = 12", "wikitext2:seq_len=12"),
        ("wikitext2:length=12", "wikitext2:length=12"),
    ],
)
def test_named_datasets_are_cut_too(name: str, expected: str) -> None:
    assert with_length(name, 256, LIMITED["roberta"]().config, tiny_tokenizer()) == expected


def test_text_that_a_model_writes_fits_too() -> None:
    model, config = LIMITED["gpt2"]().eval(), SCAPConfig.from_spec("0.4", num_samples=3)
    for sample in build_torch_samples(model, config, "auto", tiny_tokenizer()):
        assert 0 < sample["input_ids"].shape[1] <= 40
    with pytest.raises(SCAPError, match="auto needs a model that generates text, a BertForMaskedLM does not"):
        build_torch_samples(LIMITED["bert"](), config, "auto", tiny_tokenizer())


def interrupted(*_arguments: object, **_options: object) -> None:
    try:
        raise KeyboardInterrupt
    finally:
        raise ImportError("requires a library")


@pytest.mark.parametrize("method", ["build_from_quantization_config", "build_from_dataset"])
def test_an_interruption_of_the_dataset_helper_is_one(
    method: str, monkeypatch: pytest.MonkeyPatch, openvino_model: Any
) -> None:
    monkeypatch.setattr(openvino_dataset.OVCalibrationDatasetBuilder, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        if method == "build_from_dataset":
            openvino_dataset._from_builder(openvino_model, CONFIG, [], "folder", False)
        else:
            openvino_dataset._from_name(openvino_model, CONFIG, "wikitext2", "folder", None, False)


def test_a_model_that_fails_to_write_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = LIMITED["gpt2"]().eval(), SCAPConfig.from_spec("0.4", num_samples=1)
    model.transformer.h[0].ln_1.weight.data.fill_(float("nan"))
    with pytest.raises(SCAPError, match="dataset auto: a GPT2LMHeadModel could not write text: probability tensor"):
        build_torch_samples(model, config, "auto", tiny_tokenizer())
    monkeypatch.setattr(model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_torch_samples(model, config, "auto", tiny_tokenizer())


def test_what_the_dataset_helper_raises_is_explained(monkeypatch: pytest.MonkeyPatch, openvino_model: Any) -> None:
    def fails(*_arguments: object) -> None:
        raise KeyError(None)

    monkeypatch.setattr(openvino_dataset.OVCalibrationDatasetBuilder, "build_from_dataset", fails)
    with pytest.raises(
        SCAPError, match=r"cannot be calibrated on this dataset: KeyError: None; pass a dict of .*model"
    ):
        openvino_dataset._from_builder(openvino_model, CONFIG, [], "folder", False)


def test_floats_in_lists_are_what_models_take() -> None:
    """A list has no type; float64 is what numpy makes of it, and no model takes that."""
    from optimum_scap.data.samples import inputs_of

    found = inputs_of({"pixel_values": [[0.5, 1.5]], "input_ids": [[1, 2]]})
    assert found["pixel_values"].dtype == np.float32 and found["input_ids"].dtype.kind == "i"
    brought = np.zeros((1, 2))
    assert inputs_of({"x": brought})["x"].dtype == np.float64
