"""What one load of a model costs: run by `benchmark` as a process of its own, answers with one line of JSON."""

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np

from ..core.config import DenseLayers
from ..errors import SCAPError
from ..openvino import modeling  # noqa: F401  imports are not part of loading
from .speed import Stepper, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fast", action="store_true", help="with the C++ operations")
    parser.add_argument("--dense-layers", choices=get_args(DenseLayers), help="with --fast")
    arguments = parser.parse_args()
    try:
        answer: dict[str, object] = dict(measure(arguments.folder, arguments.fast, arguments.dense_layers))
    except SCAPError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


def measure(folder: Path, fast: bool, dense_layers: DenseLayers | None = None) -> dict[str, float]:
    """Peak resident memory of this process in MiB, and seconds until the model is loaded and until its first token."""
    started = time.perf_counter()
    model = load(folder, fast, dense_layers=dense_layers)
    seconds = time.perf_counter() - started
    Stepper(model.request.get_compiled_model())(np.array([[1]], dtype=np.int64), 0)
    first_token = time.perf_counter() - started
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    return {"peak_memory_mib": peak, "load_seconds": seconds, "first_token_seconds": first_token}


if __name__ == "__main__":
    main()
