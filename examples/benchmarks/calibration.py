"""Time and peak memory of `optimum-cli export openvino` with SCAP against the same command without.

Both are run alternately in one session, as subprocesses; prints the ratio with its spread, writes JSON with --json.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scaffold import new_parser, write

from optimum_scap.evaluation.report import Spread


def run(command: list[str]) -> tuple[float, float]:
    """(seconds, peak resident MiB) of a command."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(errors.decode())
    return time.monotonic() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("model", type=Path, help="Hugging Face model folder")
    parser.add_argument("dataset", type=Path, help="text file to calibrate on")
    parser.add_argument("--weight-format", default="int8")
    parser.add_argument("--scap", default="up=0.35,gate=0.35,down=0.55")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    script = str(Path(sys.executable).with_name("optimum-cli"))
    dense = [script, "export", "openvino", "-m", str(arguments.model), "--task", "text-generation-with-past"]
    dense += ["--weight-format", arguments.weight_format]
    sparse = [*dense, "--scap", arguments.scap, "--scap-dataset", str(arguments.dataset)]
    sparse += ["--scap-num-samples", str(arguments.num_samples), "--scap-seq-len", str(arguments.seq_len)]
    runs: dict[str, list[tuple[float, float]]] = {"dense": [], "scap": []}
    for _ in range(arguments.repeats):
        for name, command in (("dense", dense), ("scap", sparse)):
            with tempfile.TemporaryDirectory() as folder:
                runs[name].append(run([*command, str(Path(folder) / "out")]))
    seconds = [scap[0] / plain[0] for plain, scap in zip(runs["dense"], runs["scap"], strict=True)]
    memory = [scap[1] / plain[1] for plain, scap in zip(runs["dense"], runs["scap"], strict=True)]
    added = [scap[0] - plain[0] for plain, scap in zip(runs["dense"], runs["scap"], strict=True)]
    result = {
        "calibration": f"{arguments.num_samples} x {arguments.seq_len} tokens, {arguments.scap}",
        "weight_format": arguments.weight_format,
        "runs (seconds, peak MiB)": runs,
    }
    print(f"{result['calibration']}, {arguments.weight_format}, {arguments.repeats} alternating runs")
    print(f"time   with SCAP / without: {Spread.of(seconds).as_ratio()}   (adds {statistics.median(added):.0f} s)")
    peak = statistics.median(mebibytes for _, mebibytes in runs["scap"])
    print(f"memory with SCAP / without: {Spread.of(memory).as_ratio()}   (peak {peak:.0f} MiB)")
    write(arguments.json, result)


if __name__ == "__main__":
    main()
