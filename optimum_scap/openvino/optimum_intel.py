"""What has to be known about the inside of optimum-intel."""

import logging


def quiet_offline_guess() -> None:
    """Drops a warning that optimum-intel gives for every local folder while the hub is offline (HF_HUB_OFFLINE=1).

    It looks for the folder in the hub's cache, fails, says that it could not infer whether the model was exported, and
    loads the folder as it should. Nothing can be done about it. Calling this again is harmless.
    """
    logging.getLogger("optimum.intel.openvino.modeling_base").addFilter(_is_no_offline_guess)


def _is_no_offline_guess(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not (
        message.startswith("Could not infer whether the model was already converted")
        and ("refs/main" in message or "Path.replace()" in message)
    )
