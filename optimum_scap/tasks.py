"""The task of a model, as optimum names it."""

from pathlib import Path

from .errors import SCAPError, first_line, raise_interruption_behind


def check_model_exists(model: str | Path) -> None:
    """Checks that `model`, unless it can be a hub id, is a folder.

    Raises:
        SCAPError: otherwise.
    """
    path = Path(model)
    if path.exists() and not path.is_dir():
        raise SCAPError(f"model {model} is a file, not a folder")
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or path.parts[0] in ("..", "~")):
        raise SCAPError(f"model folder {model} does not exist")


def infer_task(model: str | Path, trust_remote_code: bool = False) -> str:
    """The optimum task of `model`, a folder or a hub id, from the architecture that its config.json names.

    Raises:
        SCAPError: if there is no usable config.json; the user can then give --task.
    """
    import transformers
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoConfig

    hint = "give the task with --task"
    check_model_exists(model)
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise SCAPError(f"model folder {model} has no config.json to tell its task; {hint}")
    try:
        config = AutoConfig.from_pretrained(str(model), trust_remote_code=trust_remote_code)
    except Exception as error:  # a config.json of wrong types fails anywhere
        raise_interruption_behind(error)
        raise SCAPError(f"model {model}: config.json cannot be read: {first_line(error)}") from error
    architectures = getattr(config, "architectures", None) or [""]
    model_class = getattr(transformers, architectures[0], None)
    if model_class is None:
        raise SCAPError(f"model {model}: config.json names no known architecture ({architectures[0]}); {hint}")
    try:
        task = TasksManager.infer_task_from_model(model_class)
    except ValueError as error:
        raise SCAPError(f"model {model}: no task is known for {architectures[0]}; {hint}") from error
    return f"{task}-with-past" if task in ("text-generation", "text2text-generation") else task
