"""Launch configurations: tuned ones from the package's data or the user's cache, a rule of thumb otherwise."""

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
INTERPRETED_MULTIPROCESSORS = 1
# Their registers allow no more at a time.
DENSE_PROGRAMS_PER_MULTIPROCESSOR = 6


@dataclass(frozen=True)
class LaunchConfiguration:
    """How a sparse kernel is launched.

    Args:
        num_warps: warps per program; every thread loads 16 bytes of a channel's weights.
        unroll: channels whose weights a program has in flight together.
        slices: parts into which the input channels are split; their partial sums are added by a second kernel.
        sum_block: columns per program of that kernel.
    """

    num_warps: int
    unroll: int
    slices: int
    sum_block: int

    def block_n(self, weight_bits: int) -> int:
        """Output columns per program."""
        return self.num_warps * 32 * 128 // weight_bits


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
    multiprocessors = int(device_key(x.device).rpartition("x")[2])
    rounds = out_features / 4 / (DENSE_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors)
    return DenseConfiguration(num_warps=4, block_n=8 if 1 < rounds <= 1.5 else 4, block_k=1024)


def configuration_for(
    x: Tensor, out_features: Sequence[int], weight_bits: int, format: str = "dense"
) -> LaunchConfiguration:
    """The configuration for layers of so many outputs that share the input `x` `[rows, in_features]`."""
    return _configuration_for(device_key(x.device), x.shape[0], x.shape[1], tuple(out_features), weight_bits, format)


@cache
def _configuration_for(
    device: str, rows: int, in_features: int, out_features: tuple[int, ...], weight_bits: int, format: str
) -> LaunchConfiguration:
    key = shape_key(in_features, out_features, weight_bits, format)
    tuned = _tuned().get(device, {}).get(key) if rows == 1 else None
    return tuned or rule_of_thumb(device, rows, in_features, out_features, weight_bits)


def rule_of_thumb(
    device: str, rows: int, in_features: int, out_features: tuple[int, ...], weight_bits: int
) -> LaunchConfiguration:
    """A configuration that is good, if not best, for any shape."""
    # Accumulators of several rows need the registers that loads in flight would take.
    unroll = 8 if rows <= 2 else 4
    num_warps = 4
    while num_warps > 1 and num_warps * 32 * 128 // weight_bits > 2 * max(out_features):
        num_warps //= 2
    configuration = LaunchConfiguration(num_warps, unroll, 1, 64)
    blocks = sum(-(-features // configuration.block_n(weight_bits)) for features in out_features)
    multiprocessors = int(device.rpartition("x")[2])
    slices = min(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // blocks, in_features // MIN_CHANNELS_PER_SLICE)
    slices = max(1, slices)
    return LaunchConfiguration(num_warps, unroll, slices, sum_block_for(slices))


def sum_block_for(slices: int) -> int:
    """Columns per program of the kernel that adds `slices` partial sums."""
    return 32 if slices > 24 else 64


def shape_key(in_features: int, out_features: Sequence[int], weight_bits: int, format: str = "dense") -> str:
    """Name of a shape in the tuned data: `4096x11008+11008x16bit` for a pair of dense 16-bit weights.

    Names of other formats follow, `4096x4096x4bit-pack-quantized`.
    """
    suffix = "" if format == "dense" else f"-{format}"
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
