"""`optimum-cli scap apply`: sparsify a folder that is exported already."""

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..core.config import SCAPConfig
from .errors import errors_for_humans
from .flags import add_recalibration_flag, add_scap_flags, what_to_apply
from .kept import parameters_kept
from .staging import check_output, check_output_is_not_model, staged_output


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
        add_recalibration_flag(add_scap_flags(parser, required=True))

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
            elif args.scap_recalibrate:
                check_dataset_name(what.config.dataset)
            with parameters_kept(args, what) as keep, staged_output(args.output) as staging:
                sparsify_folder(
                    args.model,
                    staging,
                    what,
                    task=args.task,
                    library=args.library,
                    trust_remote_code=args.trust_remote_code,
                    on_calibrated=keep,
                    recalibrate=args.scap_recalibrate,
                )
        print(f"SCAP model written to {args.output}")
