"""`optimum-cli scap build-extension`: compile the C++ operations ahead of their first use."""

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .errors import errors_for_humans


class SCAPBuildCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="build-extension", help="Compile the C++ operations ahead of their first use.")

    def run(self) -> None:
        with errors_for_humans("optimum-cli scap build-extension"):
            from ..openvino.extension.build import build_extension

            print(build_extension())
