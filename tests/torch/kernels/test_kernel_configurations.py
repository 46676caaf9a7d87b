"""Launch configurations: shipped, cached, and by rule of thumb."""

import json
import logging
from pathlib import Path

import pytest
import torch
from kernel_problems import DEVICE

from optimum_scap.torch.kernels import configurations
from optimum_scap.torch.kernels.configurations import LaunchConfiguration


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPTIMUM_SCAP_CACHE", str(tmp_path / "cache"))
    configurations.forget()
    yield configurations.cache_file()
    configurations.forget()


TUNED = LaunchConfiguration(num_warps=2, unroll=16, slices=5, sum_block=32)


def test_shipped_configurations_can_be_read(caplog: pytest.LogCaptureFixture) -> None:
    shipped = configurations.load(configurations.SHIPPED)
    assert not caplog.records and shipped
    for shapes in shipped.values():
        assert shapes and all(entry.num_warps in (1, 2, 4, 8, 16) and entry.slices > 0 for entry in shapes.values())


def test_what_was_tuned_is_used_for_one_row(cache: Path) -> None:
    x = torch.zeros(1, 48, device=DEVICE)
    key = configurations.shape_key(48, (64,), 32)
    assert configurations.configuration_for(x, (64,), 32) != TUNED
    assert configurations.save(configurations.device_key(DEVICE), {key: TUNED}) == cache
    assert configurations.configuration_for(x, (64,), 32) == TUNED
    assert configurations.configuration_for(x.expand(2, 48), (64,), 32) != TUNED
    assert configurations.configuration_for(x, (64, 64), 32) != TUNED


def test_saving_keeps_what_is_there_and_leaves_no_other_file(cache: Path) -> None:
    configurations.save("sm90x132", {"1x1x16bit": TUNED})
    configurations.save("sm90x132", {"2x2x16bit": TUNED})
    configurations.save("sm80x108", {"1x1x16bit": TUNED})
    assert {device: set(shapes) for device, shapes in configurations.load(cache).items()} == {
        "sm90x132": {"1x1x16bit", "2x2x16bit"},
        "sm80x108": {"1x1x16bit"},
    }
    assert [file.name for file in cache.parent.iterdir()] == [cache.name]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"sm90x132": 3}', '{"sm90x132": {"1x1x16bit": {"warps": 4}}}'])
def test_a_broken_cache_is_ignored_with_a_warning(cache: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert configurations.load(cache) == {}
    assert "which is no file of tuned configurations" in caplog.text
    configurations.save("sm90x132", {"1x1x16bit": TUNED})
    assert json.loads(cache.read_text())


@pytest.mark.parametrize("weight_bits", [4, 8, 16, 32])
@pytest.mark.parametrize("out_features", [(1,), (33,), (1024,), (11008,), (11008, 11008), (128256,)])
@pytest.mark.parametrize("in_features", [1, 31, 576, 4096, 28672])
def test_rule_of_thumb_fits_any_shape(in_features: int, out_features: tuple[int, ...], weight_bits: int) -> None:
    for rows in (1, 3, 8):
        chosen = configurations.rule_of_thumb("sm90x132", rows, in_features, out_features, weight_bits)
        assert 1 <= chosen.slices <= max(1, in_features // configurations.MIN_CHANNELS_PER_SLICE)
        assert chosen.num_warps in (1, 2, 4)
        assert chosen.num_warps == 1 or chosen.block_n(weight_bits) <= 2 * max(out_features)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_tuning_keeps_to_its_budget_and_is_found_again(cache: Path) -> None:
    from optimum_scap.torch.kernels.tuning import tune

    shapes = [(1024, (2752,)), (1024, (2752, 2752))]
    found = tune(shapes, torch.float16, DEVICE, budget_seconds=5.0)
    assert all(result.relative_time <= 1.0 and result.tried >= 1 for result in found.values())
    x = torch.zeros(1, 1024, dtype=torch.float16, device=DEVICE)
    key = configurations.shape_key(1024, (2752,), 16)
    assert configurations.configuration_for(x, (2752,), 16) == found[key].configuration


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("bits", [4, 8])
def test_tuning_knows_integer_weights(cache: Path, bits: int) -> None:
    from optimum_scap.torch.kernels.tuning import tune

    name = f"int{bits}"
    (key,) = tune([(1024, (2752,))], torch.float16, DEVICE, 4.0, format=name, group_size=64)
    assert key == configurations.shape_key(1024, (2752,), bits, name, 64)
    x = torch.zeros(1, 1024, dtype=torch.float16, device=DEVICE)
    tuned = configurations.load(cache)[configurations.device_key(DEVICE)][key]
    assert configurations.configuration_for(x, (2752,), bits, name, 64) == tuned
