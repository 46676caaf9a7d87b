"""Integer weights of checkpoints, and what ranks hold of them; without vLLM."""

from typing import Any

import pytest
import torch
from integer_problems import random_integers

from optimum_scap.errors import SCAPError
from optimum_scap.torch.quantized import StoredTensor
from optimum_scap.torch.readers.base import LayerShape
from optimum_scap.torch.readers.compressed_tensors import packed_config, packed_storage
from optimum_scap.torch.weights import IntegerWeights, find_format
from optimum_scap.vllm.stored import Cut, StoredLayers, cut_weights, packed_shard


IN, OUT, GROUP = 128, 96, 32
PATH = "model.layers.0.mlp.down_proj"
WHOLE = Cut(IN, OUT, 0, IN, 0, OUT)
SHAPE = LayerShape(PATH, IN, OUT)
INT32, FLOAT16 = torch.int32, torch.float16


def integers(zero_points: str, group_size: int = GROUP) -> IntegerWeights:
    return random_integers(torch.Generator().manual_seed(3), 4, OUT, IN, group_size, zero_points)


def checkpoint(kind: str, zero_points: str, group_size: int = GROUP) -> tuple[StoredLayers, dict[str, torch.Tensor]]:
    """One layer of a checkpoint, and its tensors."""
    weights = integers(zero_points, group_size)
    if weights.zero_points is not None:
        weights = weights._replace(zero_points=weights.zero_points.clamp(1, 15))  # GPTQ's, less 1, have 4 bits too
    groups = IN // group_size
    words = {"scales": ((groups, OUT), FLOAT16), "qzeros": ((groups, OUT // 8), INT32)}
    config: dict[str, Any]
    if kind == "compressed-tensors":
        storage = packed_storage(SHAPE, weights)
        config = packed_config({PATH: storage}, [])
        tensors = storage.tensors
    elif kind == "gptq":
        config = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": zero_points == "symmetric"}
        tensors = {"qweight": StoredTensor((IN // 8, OUT), INT32), "g_idx": StoredTensor((IN,), INT32)}
        tensors |= {name: StoredTensor(*found) for name, found in words.items()}
    else:
        config = {"quant_method": "awq", "bits": 4, "group_size": group_size}
        tensors = {"qweight": StoredTensor((IN, OUT // 8), INT32)}
        tensors |= {name: StoredTensor(*found) for name, found in words.items()}
    bias = {f"{PATH}.bias": StoredTensor((OUT,), FLOAT16), "model.norm.weight": StoredTensor((IN,), FLOAT16)}
    found = StoredLayers.found(config, {f"{PATH}.{name}": tensor for name, tensor in tensors.items()} | bias)
    return found, found.storage(PATH, WHOLE).write(weights)


KINDS = [
    ("compressed-tensors", "symmetric"),
    ("compressed-tensors", "zero points"),
    ("compressed-tensors", "offsets"),
    ("gptq", "symmetric"),
    ("gptq", "zero points"),
    ("awq", "zero points"),
]


@pytest.mark.parametrize(("kind", "zero_points"), KINDS)
def test_the_shards_of_ranks_make_up_the_layer(kind: str, zero_points: str) -> None:
    stored, tensors = checkpoint(kind, zero_points)
    assert set(stored.layers) == {PATH} and set(stored.layers[PATH]) == set(tensors)

    def shard(cut: Cut) -> torch.Tensor:
        format, packed = packed_shard(PATH, stored.storage(PATH, cut), tensors, cut)
        return find_format(format).dequantize(packed)

    whole = shard(WHOLE)
    halves = [shard(Cut(IN, OUT, 64 * rank, 64, 0, OUT)) for rank in range(2)]
    assert torch.equal(torch.cat(halves, dim=1), whole)
    # Neither a multiple of a word nor of a tile.
    outputs = [shard(Cut(IN, OUT, 0, IN, first, count)) for first, count in ((0, 5), (5, 60), (65, 31))]
    assert torch.equal(torch.cat(outputs), whole)


def test_one_scale_per_output_is_shared_by_the_shards_of_the_input() -> None:
    weights = integers("zero points", IN)
    half = cut_weights(weights, Cut(IN, OUT, 48, 80, 0, OUT))
    assert torch.equal(half.integers, weights.integers[:, 48:]) and torch.equal(half.scales, weights.scales)


@pytest.mark.parametrize("kind", ["compressed-tensors", "gptq", "awq"])
def test_groups_that_ranks_cannot_share_are_refused(kind: str) -> None:
    stored, _ = checkpoint(kind, "zero points", group_size=64)
    with pytest.raises(SCAPError, match="128 input channels cannot be split over 4 ranks, because 64 of them share"):
        stored.storage(PATH, Cut(IN, OUT, 32, 32, 0, OUT))


def test_tensors_that_are_wrong_are_named() -> None:
    stored, tensors = checkpoint("compressed-tensors", "symmetric")
    with pytest.raises(SCAPError, match=r"down_proj\.weight_scale has the shape \[96, 4\]"):
        stored.storage(PATH, Cut(IN, OUT + 1, 0, IN, 0, OUT))
    tensors["weight_shape"] = torch.tensor([1, 2])
    with pytest.raises(SCAPError, match=r"layer model\.layers\.0\.mlp\.down_proj: weight_shape says \[1, 2\]"):
        packed_shard(PATH, stored.storage(PATH, WHOLE), tensors, WHOLE)


def test_what_is_not_run_is_refused_by_name() -> None:
    stored, _ = checkpoint("compressed-tensors", "symmetric")
    config, tensors = stored.config, stored.layers[PATH]
    for path, words in {
        "lm_head": "lm_head: under vLLM SCAP does not run heads",
        "model.layers.0.mlp.experts.3.up_proj": "3.up_proj: under vLLM SCAP does not run experts",
    }.items():
        with pytest.raises(SCAPError, match=words):
            StoredLayers.found(config, {f"{path}.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(SCAPError, match="no tensor called weight_scale"):
        StoredLayers.found(config, {"model.norm.weight": StoredTensor((IN,), FLOAT16)})
    with pytest.raises(SCAPError, match=r"quantized \(torchao\), .*compressed-tensors, GPTQ, AWQ alone"):
        StoredLayers.found({"quant_method": "torchao"}, {})


def test_layers_that_vllm_joins_are_quantized_together_or_not_at_all() -> None:
    stored, _ = checkpoint("compressed-tensors", "symmetric")
    assert stored.holds([PATH]) and not stored.holds(["model.layers.0.mlp.up_proj"])
    with pytest.raises(SCAPError, match=r"joins the layers model\.layers\.0\.mlp\.down_proj and a\.b, of which the"):
        stored.holds([PATH, "a.b"])
    assert set(stored.renamed({PATH: "other"}).layers) == {"other"}
