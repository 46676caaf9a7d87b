"""`optimum-cli scap`: apply SCAP to exported folders, inspect, fuse and measure them."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..core.config import SCAPConfig
from ..core.parameters import SCAPParameters
from ..errors import SCAPError
from .errors import errors_for_humans
from .export import FUSED_PRECISION_HELP, FUSED_PRECISIONS, print_fused, print_operations
from .flags import add_scap_flags, what_to_apply
from .kept import parameters_kept
from .staging import check_output, check_output_is_not_model, staged_output
from .tune import SCAPTuneCommand


if TYPE_CHECKING:
    from ..evaluation.speed import Measurement


class SCAPApplyCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="apply", help="Sparsify an OpenVINO model folder that is already exported.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("model", type=Path, help="Folder of the exported OpenVINO model (INT4/INT8 included).")
        parser.add_argument("output", type=Path, help="Folder to write the sparse model to.")
        parser.add_argument("--task", default="auto", help="Task of the model; by default taken from its config.json.")
        parser.add_argument("--library", default=None, help="Library of the model, as in optimum-cli export openvino.")
        parser.add_argument(
            "--trust-remote-code", action="store_true", help="Allow code that the model folder brings with it."
        )
        add_scap_flags(parser, required=True)

    def run(self) -> None:
        args = self.args
        with errors_for_humans("optimum-cli scap apply"):
            what = what_to_apply(args)
            check_output_is_not_model(args.output, args.model, copied=True)
            check_output(args.output)

            from ..folders import sparsify_folder
            from ..openvino.dataset import check_dataset_name
            from ..openvino.files import check_folder

            check_folder(args.model)
            if isinstance(what, SCAPConfig):
                check_dataset_name(what.dataset)
            with parameters_kept(args, what) as keep, staged_output(args.output) as staging:
                sparsify_folder(
                    args.model,
                    staging,
                    what,
                    task=args.task,
                    library=args.library,
                    trust_remote_code=args.trust_remote_code,
                    on_calibrated=keep,
                )
        print(f"SCAP model written to {args.output}")


class SCAPInfoCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="info", help="Show the layers, modes, thresholds and targets of a sparse model.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("model", type=Path, help="Folder of a sparse model, OpenVINO or PyTorch.")
        parser.add_argument("--json", type=Path, help="Also write the parameters to this file, for --scap-parameters.")

    def run(self) -> None:
        args = self.args
        with errors_for_humans("optimum-cli scap info"):
            from ..core.parameter_files import save_parameters
            from ..torch.checkpoint import is_torch_folder
            from .tables import print_parameters

            found = _read_folder_parameters(args.model)
            print_parameters(args.model, found)
            if args.json is not None:
                save_parameters(SCAPParameters.merged(found.values()), args.json)
            if not is_torch_folder(args.model):
                print_operations(args.model)


def _read_folder_parameters(folder: Path) -> dict[str, SCAPParameters]:
    """The SCAP parameters of a folder by file name, whichever framework it is for."""
    from ..torch.checkpoint import is_torch_folder

    if is_torch_folder(folder):
        from ..torch.checkpoint import read_folder_parameters

        return {"config.json": read_folder_parameters(folder)}
    from ..openvino.files import read_folder_parameters as read_openvino_parameters

    return read_openvino_parameters(folder)


class SCAPFuseCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(
        name="fuse", help="Write an IR that holds the C++ operations, for openvino_genai and C++ programs."
    )

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("model", type=Path, help="Folder of a sparse model.")
        parser.add_argument("output", type=Path, help="Folder to write the fused model to.")
        parser.add_argument("--precision", choices=FUSED_PRECISIONS, default="default", help=FUSED_PRECISION_HELP)

    def run(self) -> None:
        args = self.args
        with errors_for_humans("optimum-cli scap fuse"):
            check_output_is_not_model(args.output, args.model, copied=True)
            check_output(args.output)

            from ..folders import fuse_folder, read_folder_parameters

            read_folder_parameters(args.model)
            with staged_output(args.output) as staging:
                library = fuse_folder(args.model, staging, FUSED_PRECISIONS[args.precision])
        print_fused(args.output, library)


class SCAPBuildCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="build-extension", help="Compile the C++ operations ahead of their first use.")

    def run(self) -> None:
        with errors_for_humans("optimum-cli scap build-extension"):
            from ..openvino.extension.build import build_extension

            print(build_extension())


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
            _read_folder_parameters(args.model)
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


class SCAPCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="scap", help="Activation sparsity (SCAP): apply it to exported models, inspect them.")
    SUBCOMMANDS = (
        CommandInfo("apply", SCAPApplyCommand.COMMAND.help, SCAPApplyCommand),
        CommandInfo("info", SCAPInfoCommand.COMMAND.help, SCAPInfoCommand),
        CommandInfo("fuse", SCAPFuseCommand.COMMAND.help, SCAPFuseCommand),
        CommandInfo("build-extension", SCAPBuildCommand.COMMAND.help, SCAPBuildCommand),
        CommandInfo("benchmark", SCAPBenchmarkCommand.COMMAND.help, SCAPBenchmarkCommand),
        CommandInfo("tune", SCAPTuneCommand.COMMAND.help, SCAPTuneCommand),
    )
