"""`optimum-cli scap`: apply SCAP to an exported folder, and show what a folder holds."""

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .errors import errors_for_humans
from .flags import add_scap_flags, config_from_flags
from .staging import check_output, staged_output


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
            config = config_from_flags(args)
            check_output(args.output)

            from ..errors import SCAPError
            from ..openvino.dataset import check_dataset_name
            from ..openvino.folder import check_folder, sparsify_folder

            check_folder(args.model)
            if args.output.resolve() == args.model.resolve():
                raise SCAPError(f"output folder {args.output} is the model folder itself; choose another")
            check_dataset_name(config.dataset)
            with staged_output(args.output) as staging:
                sparsify_folder(
                    args.model,
                    staging,
                    config,
                    task=args.task,
                    library=args.library,
                    trust_remote_code=args.trust_remote_code,
                )
        print(f"SCAP model written to {args.output}")


class SCAPInfoCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="info", help="Show the layers, modes, thresholds and targets of a sparse model.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("model", type=Path, help="Folder of a sparse model.")

    def run(self) -> None:
        with errors_for_humans("optimum-cli scap info"):
            from ..openvino.folder import read_folder_parameters
            from .tables import print_parameters

            print_parameters(self.args.model, read_folder_parameters(self.args.model))


class SCAPCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="scap", help="Activation sparsity (SCAP): apply it to exported models, inspect them.")
    SUBCOMMANDS = (
        CommandInfo("apply", SCAPApplyCommand.COMMAND.help, SCAPApplyCommand),
        CommandInfo("info", SCAPInfoCommand.COMMAND.help, SCAPInfoCommand),
    )
