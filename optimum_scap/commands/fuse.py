"""`optimum-cli scap fuse`: an IR that holds the C++ operations."""

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .errors import errors_for_humans
from .export_openvino import FUSED_PRECISION_HELP, FUSED_PRECISIONS, print_fused
from .staging import check_output, check_output_is_not_model, staged_output


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

            from ..folders import fuse_folder
            from ..openvino.files import read_folder_parameters

            read_folder_parameters(args.model)
            with staged_output(args.output) as staging:
                library = fuse_folder(args.model, staging, FUSED_PRECISIONS[args.precision])
        print_fused(args.output, library)
