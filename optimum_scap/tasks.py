"""The task of a model, as optimum names it."""

from pathlib import Path

from .errors import SCAPError, first_line


def infer_task(model: str | Path, trust_remote_code: bool = False) -> str:
    """The optimum task of `model`, a folder or a hub id, from the architecture that its config.json names.

    Raises:
        SCAPError: if there is no usable config.json; the user can then give --task.
    """
    import transformers
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoConfig

    hint = "give the task with --task"
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise SCAPError(f"model folder {model} has no config.json to tell its task; {hint}")
    try:
        config = AutoConfig.from_pretrained(str(model), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
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
