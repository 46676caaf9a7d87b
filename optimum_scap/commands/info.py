"""`optimum-cli scap info`: what a sparse model says about itself."""

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..core.parameters import SCAPParameters
from .errors import errors_for_humans
from .export_openvino import print_operations


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
            from ..folders import read_folder_parameters
            from ..torch.checkpoint import is_torch_folder
            from .tables import print_parameters

            found = read_folder_parameters(args.model)
            print_parameters(args.model, found)
            if args.json is not None:
                save_parameters(SCAPParameters.merged(found.values()), args.json)
            if not is_torch_folder(args.model):
                print_operations(args.model)
