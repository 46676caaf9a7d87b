"""Where the time of loading goes: a sparse OpenVINO folder with the C++ operations against the dense one, in stages.

    python examples/benchmarks/openvino_load.py DENSE SPARSE

Both are loaded several times in one process, in turn, and generate a token. The first time memory is new: the system
finds, zeroes and maps every page that weights are packed into; `new memory` is what that takes by itself, for as much
memory as `fuse` fills. OpenVINO packs its weights when the first token is computed, ours are packed by `fuse`.
"""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from scaffold import new_parser, write

from optimum_scap.evaluation.machine import describe_machine
from optimum_scap.evaluation.speed import Stepper
from optimum_scap.openvino.arithmetic import preferred_precision
from optimum_scap.openvino.extension.build import build_extension
from optimum_scap.openvino.fuse import fuse


def timed(run: Callable[[], Any], stages: list[float]) -> Any:
    started = time.perf_counter()
    result = run()
    stages.append(time.perf_counter() - started)
    return result


def packed_bytes(model: ov.Model) -> int:
    operations = [node for node in model.get_ops() if node.get_type_name().startswith("SCAP")]
    return sum(int(np.prod(value.get_shape())) for node in operations for value in node.input_values()[1:])


def touch(size: int) -> None:
    np.empty(size, np.uint8)[::4096] = 1


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("dense", type=Path)
    parser.add_argument("sparse", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(describe_machine())
    runs = []
    library, precision = build_extension(), preferred_precision()
    core = ov.Core()
    for repeat in range(1, 1 + arguments.repeats):
        loads = {}
        for name, folder in {"dense": arguments.dense, "SCAP": arguments.sparse}.items():
            stages: list[float] = []
            model = timed(lambda folder=folder: core.read_model(folder / "openvino_model.xml"), stages)
            if name == "SCAP":
                timed(lambda model=model: fuse(model, precision=precision, library=library), stages)
            else:
                stages.append(0.0)
            compiled = timed(
                lambda model=model: core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"}), stages
            )
            step = Stepper(compiled)
            timed(lambda step=step: step(np.array([[1]], np.int64), 0), stages)
            loads[name] = stages
            new_memory: list[float] = []
            if name == "SCAP":
                size = packed_bytes(model)
                timed(lambda size=size: touch(size), new_memory)
            del model, compiled, step
            gc.collect()
            read, fused, compile_, token = stages
            line = f"{repeat}. {name}: read {read:.2f}, fuse {fused:.2f}, compile {compile_:.2f}, token {token:.2f} s"
            print(f"{line}; new memory {new_memory[0]:.2f} s" if new_memory else line)
        runs.append(loads)
        load, whole = (sum(loads["SCAP"][:n]) / sum(loads["dense"][:n]) for n in (3, 4))
        print(f"{repeat}. SCAP over dense: load {load:.2f}x, load and first token {whole:.2f}x")
    write(arguments.json, {"seconds to read, fuse, compile and for a token": runs})


if __name__ == "__main__":
    main()
