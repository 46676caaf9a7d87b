"""`optimum-cli scap`: apply SCAP to exported folders, inspect, fuse and measure them; a file per command."""

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .apply import SCAPApplyCommand
from .benchmark import SCAPBenchmarkCommand
from .build_extension import SCAPBuildCommand
from .fuse import SCAPFuseCommand
from .info import SCAPInfoCommand
from .tune import SCAPTuneCommand


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
