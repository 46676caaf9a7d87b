"""Makes optimum-cli know SCAP. Installed into the namespace folder optimum/commands/register, which it reads."""

from optimum.commands.export.base import ExportCommand

from optimum_scap.commands.export_openvino import extend_openvino_export
from optimum_scap.commands.export_torch import TorchExportCommand
from optimum_scap.commands.scap import SCAPCommand


extend_openvino_export()

REGISTER_COMMANDS = [SCAPCommand, (TorchExportCommand, ExportCommand)]
