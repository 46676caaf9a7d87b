"""`optimum-cli export torch --scap`: a sparse PyTorch checkpoint that AutoModelFor... loads."""

from argparse import ArgumentParser
from pathlib import Path

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..core.config import SCAPConfig
from ..errors import SCAPError
from .errors import errors_for_humans
from .flags import add_learning_flags, add_recalibration_flag, add_scap_flags, what_to_apply
from .kept import parameters_kept
from .staging import check_output, check_output_is_not_model, staged_output


class TorchExportCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="torch", help="Write a PyTorch checkpoint with SCAP activation sparsity.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("-m", "--model", required=True, help="Folder, hub id or GGUF file of the model.")
        parser.add_argument("output", type=Path, help="Folder to write the sparse checkpoint to.")
        parser.add_argument("--task", default="auto", help="Task of the model; by default taken from its config.json.")
        parser.add_argument(
            "--dtype",
            default="auto",
            choices=("auto", "float32", "float16", "bfloat16"),
            help="Data type of the weights. Default: that of the checkpoint.",
        )
        parser.add_argument("--device", default="auto", help="Where to calibrate, e.g. cpu or cuda:0. Default: auto.")
        parser.add_argument("--cache_dir", default=None, help="Where downloaded models are cached.")
        parser.add_argument("--revision", default=None, help="Revision of a model on the hub.")
        parser.add_argument(
            "--trust-remote-code", action="store_true", help="Allow code that the model brings with it."
        )
        parser.add_argument(
            "--weight-format",
            choices=("int8", "int4"),
            help=(
                "Quantize the weights of a float model first, by NNCF; saved as compressed-tensors pack-quantized. "
                "Default: weights stay as they are, quantized ones among them."
            ),
        )
        parser.add_argument(
            "--group-size",
            type=int,
            help="Input channels that share a scale of int4; -1 for one scale per output channel. Default: 128.",
        )
        parser.add_argument("--sym", action="store_true", help="Quantize symmetrically, without zero points.")
        group = add_scap_flags(parser, required=True)
        add_learning_flags(group)
        add_recalibration_flag(group)

    def run(self) -> None:
        args = self.args
        with errors_for_humans("optimum-cli export torch"):
            if args.weight_format is None and (args.group_size is not None or args.sym):
                flag = "--sym" if args.sym else "--group-size"
                raise SCAPError(f"{flag} needs --weight-format, which says what to quantize to")
            what = what_to_apply(args)
            check_output_is_not_model(args.output, args.model)
            check_output(args.output)

            from ..folders import export_checkpoint
            from ..torch.dataset import check_dataset_name

            if isinstance(what, SCAPConfig):
                check_dataset_name(what.dataset)
            elif args.scap_recalibrate:
                check_dataset_name(what.config.dataset)
            given = {"cache_dir": args.cache_dir, "revision": args.revision}
            with parameters_kept(args, what) as keep, staged_output(args.output) as staging:
                export_checkpoint(
                    args.model,
                    staging,
                    what,
                    task=args.task,
                    dtype=args.dtype,
                    device=args.device,
                    trust_remote_code=args.trust_remote_code,
                    options={name: value for name, value in given.items() if value is not None},
                    weight_format=args.weight_format,
                    group_size=args.group_size,
                    symmetric=args.sym,
                    on_calibrated=keep,
                    recalibrate=args.scap_recalibrate,
                )
        print(f"SCAP model written to {args.output}")
