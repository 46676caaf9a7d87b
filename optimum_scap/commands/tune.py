"""`optimum-cli scap tune`: launch configurations of the GPU kernels for one model's shapes, ahead of its first use."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from ..errors import SCAPError
from .errors import errors_for_humans


class SCAPTuneCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="tune", help="Tune the GPU kernels for a sparse PyTorch checkpoint on this machine.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("model", type=Path, help="Folder of a sparse PyTorch checkpoint.")
        parser.add_argument("--budget", type=float, default=60.0, help="Seconds to spend in all. Default: 60.")

    def run(self) -> None:
        args = self.args
        with errors_for_humans("optimum-cli scap tune"):
            if not args.budget > 0:
                raise SCAPError("--budget must be a positive number of seconds")
            from ..torch.checkpoint import integer_kernel_shapes, is_torch_folder, kernel_shapes

            if not is_torch_folder(args.model):
                raise SCAPError(f"model folder {args.model} holds no PyTorch checkpoint: there is nothing to tune")
            shapes = kernel_shapes(args.model)
            integer_shapes = integer_kernel_shapes(args.model)

            import torch

            from ..torch.kernels.library import triton_is_there

            if not torch.cuda.is_available() or not triton_is_there():
                raise SCAPError("tuning needs a GPU and Triton; without them the kernels are not used")
            from ..torch.kernels.configurations import cache_file
            from ..torch.kernels.tuning import tune

            jobs: list[tuple[Any, Any, dict[str, Any]]] = [(dtype, of_dtype, {}) for dtype, of_dtype in shapes.items()]
            for (bits, group_size, dtype), of_kind in integer_shapes.items():
                jobs.append((dtype, of_kind, {"format": f"int{bits}", "group_size": group_size}))
            for dtype, together, options in jobs:
                found = tune(sorted(together), dtype, budget_seconds=args.budget / len(jobs), **options)
                for name, tuned in found.items():
                    print(f"{name}: {tuned.relative_time:.2f}x the time of the rule of thumb ({tuned.tried} tried)")
            print(f"kept in {cache_file()}")
