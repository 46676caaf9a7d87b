"""`optimum-cli scap benchmark`: a sparse model side by side with the dense one, on this machine.

Where dense layers of a sparse model run through operations of ours too, what is left without those is shown beside.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..errors import SCAPError
from .errors import errors_for_humans


if TYPE_CHECKING:
    from ..evaluation.report import Report


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
            from .tables import print_report

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
            report = run(args.model, args.baseline, vars_of(args))
            print_report(report)
            if args.json is not None:
                args.json.write_text(report.to_json(), encoding="utf-8")


def _benchmark_openvino(model: Path, baseline: Path | None, settings: dict[str, Any]) -> "Report":
    from ..evaluation.speed import SCAP, measure, openvino_contestants, realized_sparsity, report_of
    from ..openvino.files import check_folder, check_is_portable

    for folder in (model, baseline):
        if folder is not None:
            check_folder(folder)
            check_is_portable(folder)  # the portable operations are measured too
    contestants = openvino_contestants(model, baseline)
    quantities = measure(contestants, **settings)
    return report_of(contestants, quantities, {SCAP: realized_sparsity(model)}, settings)


def _benchmark_torch(model: Path, baseline: Path | None, settings: dict[str, Any]) -> "Report":
    import torch

    from ..evaluation.speed import report_of
    from ..evaluation.torch_speed import measure, torch_contestants

    gpu = torch.cuda.is_available()
    contestants = torch_contestants(model, baseline, gpu=gpu)
    quantities, sparsity = measure(contestants, **settings)
    return report_of(contestants, quantities, sparsity, settings, gpu=gpu)


def vars_of(args: Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("prompt_tokens", "new_tokens", "repeats")}
