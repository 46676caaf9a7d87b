"""Launch configurations: tuned ones from the package's data or the user's cache, a rule of thumb otherwise."""

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ...cache import cache_folder


logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).with_name("tuned.json")
# Enough programs to keep every multiprocessor's loads in flight, measured on an H200.
PROGRAMS_PER_MULTIPROCESSOR = 4
MIN_CHANNELS_PER_SLICE = 32
# For integer weights, measured on an H100.
INTEGER_WARPS_PER_MULTIPROCESSOR = 11
INTEGER_LANE_BYTES = 8
MAX_SUMS_PER_THREAD = 32
INTERPRETED_MULTIPROCESSORS = 1
# Their registers allow no more at a time.
DENSE_PROGRAMS_PER_MULTIPROCESSOR = 6


@dataclass(frozen=True)
class LaunchConfiguration:
    """How a sparse kernel is launched.

    Args:
        num_warps: warps per program.
        unroll: channels whose weights a program has in flight together.
        slices: parts into which the input channels are split; their partial sums are added by a second kernel.
        sum_block: columns per program of that kernel.
        lane_bytes: bytes of a channel's weights that a thread loads at once.
    """

    num_warps: int
    unroll: int
    slices: int
    sum_block: int
    lane_bytes: int = 16

    def block_n(self, weight_bits: int) -> int:
        """Output columns per program."""
        return self.num_warps * 32 * 8 * self.lane_bytes // weight_bits


@dataclass(frozen=True)
class DenseConfiguration:
    """How the dense kernel is launched.

    Args:
        num_warps: warps per program.
        block_n: outputs per program.
        block_k: input channels per step; the weights of the next step are under way meanwhile.
    """

    num_warps: int
    block_n: int
    block_k: int


def dense_configuration_for(x: Tensor, out_features: int) -> DenseConfiguration:
    """The configuration for weights over the input `x` that make `out_features` outputs together.

    Measured on an H200: four outputs per program are best but where they fill the GPU once and leave a small rest.
    """
    multiprocessors = _multiprocessors(device_key(x.device))
    rounds = out_features / 4 / (DENSE_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors)
    return DenseConfiguration(num_warps=4, block_n=8 if 1 < rounds <= 1.5 else 4, block_k=1024)


def configuration_for(
    x: Tensor, out_features: Sequence[int], weight_bits: int, format: str = "dense", group_size: int | None = None
) -> LaunchConfiguration:
    """The configuration for layers of so many outputs that share the input `x` `[rows, in_features]`."""
    rows, in_features = x.shape
    device = device_key(x.device)
    return _configuration_for(device, rows, in_features, tuple(out_features), weight_bits, format, group_size)


@cache
def _configuration_for(
    device: str,
    rows: int,
    in_features: int,
    out_features: tuple[int, ...],
    weight_bits: int,
    format: str,
    group_size: int | None,
) -> LaunchConfiguration:
    key = shape_key(in_features, out_features, weight_bits, format, group_size)
    tuned = _tuned().get(device, {}).get(key) if rows == 1 else None
    return tuned or rule_of_thumb(device, rows, in_features, out_features, weight_bits, group_size)


def rule_of_thumb(
    device: str,
    rows: int,
    in_features: int,
    out_features: tuple[int, ...],
    weight_bits: int,
    group_size: int | None = None,
) -> LaunchConfiguration:
    """A configuration that is good, if not best, for any shape."""
    if group_size is not None:
        return _rule_for_integers(device, rows, in_features, out_features, weight_bits, group_size)
    # Accumulators of several rows need the registers that loads in flight would take.
    unroll = 8 if rows <= 2 else 4
    configuration = _narrowed(LaunchConfiguration(4, unroll, 1, 64), out_features, weight_bits)
    blocks = _blocks(configuration, out_features, weight_bits)
    multiprocessors = _multiprocessors(device)
    slices = min(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // blocks, in_features // MIN_CHANNELS_PER_SLICE)
    slices = max(1, slices)
    return replace(configuration, slices=slices, sum_block=sum_block_for(slices))


def _rule_for_integers(
    device: str, rows: int, in_features: int, out_features: tuple[int, ...], weight_bits: int, group_size: int
) -> LaunchConfiguration:
    unroll = 8 if rows <= 2 else 4
    lane_bytes = INTEGER_LANE_BYTES
    # A thread has a sum per row and integer.
    while lane_bytes > 4 and rows * lane_bytes * 8 // weight_bits > MAX_SUMS_PER_THREAD:
        lane_bytes //= 2
    configuration = _narrowed(LaunchConfiguration(2, unroll, 1, 64, lane_bytes), out_features, weight_bits)
    warps = _blocks(configuration, out_features, weight_bits) * configuration.num_warps
    slices = INTEGER_WARPS_PER_MULTIPROCESSOR * _multiprocessors(device) // warps
    slices = max(1, min(slices, in_features // MIN_CHANNELS_PER_SLICE))
    slices = slices_within_groups(slices, in_features, group_size)
    return replace(configuration, slices=slices, sum_block=sum_block_for(slices))


def _narrowed(
    configuration: LaunchConfiguration, out_features: tuple[int, ...], weight_bits: int
) -> LaunchConfiguration:
    while configuration.num_warps > 1 and configuration.block_n(weight_bits) > 2 * max(out_features):
        configuration = replace(configuration, num_warps=configuration.num_warps // 2)
    return configuration


def _blocks(configuration: LaunchConfiguration, out_features: tuple[int, ...], weight_bits: int) -> int:
    return sum(-(-features // configuration.block_n(weight_bits)) for features in out_features)


def _multiprocessors(device: str) -> int:
    return int(device.rpartition("x")[2])


def slices_within_groups(slices: int, in_features: int, group_size: int) -> int:
    """A number of slices close to `slices` for which no slice holds channels of two groups, if there is one."""
    if group_size == in_features:
        return slices
    groups = in_features // group_size
    fits = [groups * parts for parts in range(1, group_size + 1) if group_size % parts == 0]
    closest = min(fits, key=lambda fitting: max(fitting / slices, slices / fitting))
    # Partial sums of shorter slices would take longer than groups of more scales in a slice.
    if closest <= 1.5 * slices or in_features // closest >= 64:
        return closest
    return slices


def sum_block_for(slices: int) -> int:
    """Columns per program of the kernel that adds `slices` partial sums."""
    return 32 if slices > 24 else 64


def shape_key(
    in_features: int,
    out_features: Sequence[int],
    weight_bits: int,
    format: str = "dense",
    group_size: int | None = None,
) -> str:
    """Name of a shape in the tuned data: `4096x11008+11008x16bit` for a pair of dense 16-bit weights.

    Names of other formats and groups follow, `4096x4096x4bit-int4-g128`.
    """
    suffix = "" if format == "dense" else f"-{format}"
    if group_size is not None:
        suffix += f"-g{group_size}"
    return f"{in_features}x{'+'.join(map(str, out_features))}x{weight_bits}bit{suffix}"


@cache
def device_key(device: torch.device) -> str:
    """Name of a kind of GPU in the tuned data: its architecture and number of multiprocessors, `sm90x132`."""
    if device.type != "cuda":
        return f"interpreterx{INTERPRETED_MULTIPROCESSORS}"
    properties = torch.cuda.get_device_properties(device)
    architecture = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    name = architecture.partition(":")[0] or f"sm{properties.major}{properties.minor}"
    return f"{name}x{properties.multi_processor_count}"


@cache
def supports_early_launch(device: torch.device) -> bool:
    """Whether the GPU knows programmatic dependent launch: NVIDIA, compute capability 9.0 and later."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def cache_file() -> Path:
    """Where configurations tuned on this machine are kept: in `$OPTIMUM_SCAP_CACHE`, or the user's cache.

    Raises:
        SCAPError: there is no folder for the cache.
    """
    return cache_folder() / "triton_configurations.json"


Tuned = dict[str, dict[str, LaunchConfiguration]]


@cache
def _tuned() -> Tuned:
    tuned = load(SHIPPED)
    for device, shapes in load(cache_file()).items():
        tuned.setdefault(device, {}).update(shapes)
    return tuned


def load(path: Path) -> Tuned:
    """{device key: {shape key: configuration}} of a file; empty, with a warning, if the file cannot be used."""
    try:
        entries = json.loads(path.read_text())
        return {
            device: {shape: LaunchConfiguration(**fields) for shape, fields in shapes.items()}
            for device, shapes in entries.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        logger.warning("ignoring %s, which is no file of tuned configurations: %s", path, error)
        return {}


def save(device: str, shapes: dict[str, LaunchConfiguration], path: Path | None = None) -> Path:
    """Adds tuned configurations to the user's cache; readers see the old or the new file, never a part of one."""
    path = path or cache_file()
    tuned = load(path)
    tuned.setdefault(device, {}).update(shapes)
    entries = {
        key: {shape: asdict(configuration) for shape, configuration in sorted(of_device.items())}
        for key, of_device in sorted(tuned.items())
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(entries, file, indent=1)
    os.replace(file.name, path)
    forget()
    return path


def forget() -> None:
    """Has the next launch read the tuned data anew."""
    _tuned.cache_clear()
    _configuration_for.cache_clear()
