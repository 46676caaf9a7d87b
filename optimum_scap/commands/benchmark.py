"""`optimum-cli scap benchmark`: a sparse model side by side with the dense one, on this machine."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..errors import SCAPError
from .errors import errors_for_humans


if TYPE_CHECKING:
    from ..evaluation.speed import Measurement


class SCAPBenchmarkCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="benchmark", help="Measure a sparse model on this machine, side by side with dense.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("model", type=Path, help="Folder of a sparse model.")
        parser.add_argument(
            "--baseline",
            type=Path,
            help=(
                "Folder of the dense model to compare with. A PyTorch checkpoint holds the dense model's weights and "
                "is compared with those by default."
            ),
        )
        parser.add_argument(
            "--prompt-tokens",
            type=int,
            nargs="+",
            default=[128],
            help="Tokens per prefill, one or several lengths; decoding starts behind the first. Default: 128.",
        )
        parser.add_argument("--new-tokens", type=int, default=64, help="Tokens decoded one by one. Default: 64.")
        parser.add_argument("--repeats", type=int, default=5, help="Number of repeats. Default: 5.")
        parser.add_argument("--json", type=Path, help="Also write the figures to this file.")

    def run(self) -> None:
        args = self.args
        with errors_for_humans("optimum-cli scap benchmark"):
            from ..folders import read_folder_parameters
            from ..torch.checkpoint import is_torch_folder
            from .tables import print_benchmark

            for name, values in (
                ("--prompt-tokens", args.prompt_tokens),
                ("--new-tokens", [args.new_tokens]),
                ("--repeats", [args.repeats]),
            ):
                if min(values) < 1:
                    raise SCAPError(f"{name} must be at least 1")
            if args.json is not None and not args.json.absolute().parent.is_dir():
                raise SCAPError(f"--json: the folder of {args.json} does not exist")
            read_folder_parameters(args.model)
            run = _benchmark_torch if is_torch_folder(args.model) else _benchmark_openvino
            measurements, sparsity = run(args.model, args.baseline, vars_of(args))
            print_benchmark(measurements, sparsity)
            if args.json is not None:
                from ..evaluation.speed import as_json

                result = {"models": as_json(measurements), "realised_sparsity": sparsity, "settings": vars_of(args)}
                args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _benchmark_openvino(
    model: Path, baseline: Path | None, settings: dict[str, Any]
) -> tuple[list["Measurement"], dict[str, float]]:
    from ..evaluation.speed import measure, realised_sparsity
    from ..openvino.files import check_folder, check_is_portable

    for folder in (model, baseline):
        if folder is not None:
            check_is_portable(folder)  # the portable operations are measured too
    models = {"SCAP": (model, True), "SCAP, portable": (model, False)}
    if baseline is not None:
        check_folder(baseline)
        models = {"dense": (baseline, False), **models}
    return measure(models, **settings), realised_sparsity(model)


def _benchmark_torch(
    model: Path, baseline: Path | None, settings: dict[str, Any]
) -> tuple[list["Measurement"], dict[str, float]]:
    from ..evaluation.torch_speed import measure

    # A sparse checkpoint holds the dense model's weights: without a baseline it is compared with that.
    return measure({"dense": (baseline or model, False), "SCAP": (model, True)}, **settings)


def vars_of(args: Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("prompt_tokens", "new_tokens", "repeats")}
