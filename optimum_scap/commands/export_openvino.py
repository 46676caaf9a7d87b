"""`optimum-cli export openvino --scap`: optimum-intel's own command, then SCAP on what it exported."""

import json
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..core.config import SCAPConfig
from ..core.parameter_files import checkpoint_parameters
from ..core.parameters import SCAPParameters
from ..errors import SCAPError
from .errors import errors_for_humans
from .flags import add_learning_flags, add_recalibration_flag, add_scap_flags, check_scap_is_given, what_to_apply
from .kept import parameters_kept
from .staging import check_output, check_output_is_not_model, scratch_folder, staged_output


# What --precision and --scap-fused-precision say, and what `fuse_folder` takes.
FUSED_PRECISIONS = {"default": None, "f32": "f32"}
FUSED_PRECISION_HELP = (
    "Arithmetic of the C++ operations, for good: openvino_genai and C++ programs cannot change it with "
    "INFERENCE_PRECISION_HINT. default: bf16 where this CPU has it, else close to float32; f32: float32 throughout. "
    "Default: default."
)


def extend_openvino_export() -> None:
    """Adds the --scap flags to optimum-intel's export command. Without --scap the command runs as it always did.

    Two commands of one name collide in argparse, so the command class itself is extended.
    """
    try:
        from optimum.commands.export.openvino import OVExportCommand
    except ImportError:  # optimum-intel is not installed: there is no such command to extend
        return
    if getattr(OVExportCommand, "_knows_scap", False):
        return
    parse_args, run = OVExportCommand.parse_args, OVExportCommand.run

    def parse_args_with_scap(parser: ArgumentParser) -> Any:
        parse_args(parser)
        group = add_scap_flags(parser, required=False)
        add_learning_flags(group)
        add_recalibration_flag(group)
        group.add_argument(
            "--scap-fused",
            action="store_true",
            help="Write an IR that holds the C++ operations (see scap fuse); stock OpenVINO cannot read it.",
        )
        group.add_argument("--scap-fused-precision", choices=FUSED_PRECISIONS, help=FUSED_PRECISION_HELP)

    def run_with_scap(command: Any) -> None:
        with_scap = any(getattr(command.args, name, None) is not None for name in ("scap", "scap_parameters"))
        if with_scap:
            _export_sparse(command, run)
            return
        with errors_for_humans("optimum-cli export openvino"):
            check_scap_is_given(command.args)
        run(command)

    OVExportCommand.parse_args = staticmethod(parse_args_with_scap)
    OVExportCommand.run = run_with_scap
    OVExportCommand._knows_scap = True


def _export_sparse(command: Any, export: Any) -> None:
    args = command.args
    with errors_for_humans("optimum-cli export openvino"):
        what = what_to_apply(args)
        if args.scap_fused_precision is not None and not args.scap_fused:
            raise SCAPError("--scap-fused-precision needs --scap-fused")
        output = Path(args.output)
        check_output_is_not_model(output, args.model)
        check_output(output)

        _check_is_dense(args.model)
        _check_is_not_pickled(args.model)

        # Imports torch and openvino: only once the cheap checks have passed.
        from ..checkpoint import check_checkpoint
        from ..folders import fuse_folder, sparsify_folder
        from ..openvino.dataset import check_dataset_name
        from ..tasks import infer_task

        if isinstance(what, SCAPConfig):
            check_dataset_name(what.dataset)
            _check_can_learn_for(what)
        elif args.scap_recalibrate:
            check_dataset_name(what.config.dataset)
        check_checkpoint(args.model)
        if args.task == "auto" and Path(args.model).is_dir():
            args.task = infer_task(args.model, args.trust_remote_code)
        with parameters_kept(args, what) as keep, staged_output(output) as staging:
            recalibrate, source = args.scap_recalibrate, args.model
            if isinstance(what, SCAPConfig) and what.learn:
                what, recalibrate = _learn(args, what, scratch_folder(staging), keep), True
            args.output = staging
            export(command)
            _name_source(staging, args.model, source)
            sparsify_folder(
                staging,
                staging,
                what,
                task=args.task,
                library=args.library,
                trust_remote_code=args.trust_remote_code,
                tokenizer=args.model,
                on_calibrated=keep if isinstance(what, SCAPConfig) else None,
                recalibrate=recalibrate,
            )
            precision = FUSED_PRECISIONS[args.scap_fused_precision or "default"]
            library = fuse_folder(staging, staging, precision) if args.scap_fused else None
    if library is not None:
        print_fused(output, library)
    else:
        print(f"SCAP model written to {output}")


def _learn(args: Any, config: SCAPConfig, folder: Path, keep: Callable[[SCAPParameters], None]) -> SCAPParameters:
    """Learns with the PyTorch model, and has the export read the weights with the gains in them, from `folder`."""
    from ..folders import learn_parameters

    learned = learn_parameters(
        args.model,
        folder,
        config,
        task=args.task,
        trust_remote_code=args.trust_remote_code,
        options={} if args.cache_dir is None else {"cache_dir": args.cache_dir},
    )
    if "gains" in config.learn:
        args.model = str(folder)
    else:
        keep(learned)  # any weights take them
    return learned


def _name_source(folder: Path, read: str, source: str) -> None:
    """Has optimum-intel's record of an export name the model that the user gave, not the folder that was read."""
    record = folder / "openvino_config.json"
    if read != source and record.is_file():
        content = record.read_text(encoding="utf-8")
        record.write_text(content.replace(json.dumps(read), json.dumps(source)), encoding="utf-8")


def _check_can_learn_for(config: SCAPConfig) -> None:
    """Before anything is learned: whether an IR can take it."""
    if "biases" in config.learn and config.apply_to == "decode":
        raise SCAPError(
            "learned biases belong to pruned tokens, and an OpenVINO model cannot add them to those alone: use "
            "--scap-apply-to all, or --scap-learn thresholds"
        )


def _check_is_dense(model: str) -> None:
    folder = Path(model)
    if (folder / "config.json").is_file() and checkpoint_parameters(folder) is not None:
        raise SCAPError(f"model folder {model} is sparse already: export it without --scap, its thresholds come along")


def _check_is_not_pickled(model: str) -> None:
    folder = Path(model)
    pickled = next(folder.glob("pytorch_model*.bin"), None) if folder.is_dir() else None
    if pickled is not None and next(folder.glob("*.safetensors"), None) is None:
        raise SCAPError(
            f"model folder {model} holds its weights as a pickle ({pickled.name}), which can run code when opened "
            "and is not read; load it where you trust it, and save_pretrained writes safetensors"
        )


def print_fused(output: Path, library: Path) -> None:
    print(f"Fused SCAP model written to {output}")
    print(f"It needs the library {library}")
    print_operations(output)
    if "CausalLM" in (output / "config.json").read_text(encoding="utf-8"):
        folder, extension = json.dumps(str(output)), json.dumps(str(library))  # whatever marks are in their names
        print(f'Run it with openvino_genai.LLMPipeline({folder}, "CPU", extensions=[{extension}])')


def print_operations(folder: Path) -> None:
    """A line for every fused IR in `folder` whose arithmetic is not what a hint of f32 asks for."""
    from ..openvino.files import model_files
    from ..openvino.fused_ir import is_fused, read_fused_ir

    for path in filter(is_fused, model_files(folder)):
        precisions = " and ".join(sorted(read_fused_ir(path).precisions))
        if precisions != "f32":
            print(
                f"Its operations in {path.name} compute in {precisions}, whatever INFERENCE_PRECISION_HINT "
                "openvino_genai or a C++ program sets; fuse with precision f32 for float32 throughout"
            )
