"""lm-eval on SCAP checkpoints: `python -m optimum_scap.evaluation.lm_eval --model hf --model_args pretrained=DIR ...`.

The command is lm-eval's own, with every option of it; transformers has only been told what a SCAP checkpoint is. (In
Python, `import optimum_scap` before `lm_eval.simple_evaluate` does the same.)
"""

from ..errors import SCAPError


def main() -> None:
    """Runs lm-eval's command line.

    Raises:
        SCAPError: if lm-eval is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise SCAPError('lm-eval is not installed: pip install "optimum-scap[eval]"') from error
    cli_evaluate()


if __name__ == "__main__":
    main()
