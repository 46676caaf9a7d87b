"""The C++ operations in openvino_genai.

A pipeline takes the library as `extensions=[LIBRARY]`. That comes too late for a draft model, which
`openvino_genai.draft_model` reads before there is a pipeline, and which takes no `extensions` of its own:

    from optimum_scap.openvino.genai import register_operations

    register_operations()
    draft = openvino_genai.draft_model("FUSED", "CPU")
    pipeline = openvino_genai.LLMPipeline("MODEL", "CPU", draft_model=draft)
"""

import tempfile
from functools import lru_cache
from pathlib import Path

from ..errors import SCAPError, first_line
from .extension.build import ExtensionBuildError, build_extension


@lru_cache
def register_operations(library: Path | None = None) -> Path:
    """Lets every model that openvino_genai reads from now on in this process hold the operations.

    Args:
        library: the compiled operations; by default they are compiled, if they are not yet.

    Returns:
        The library.

    Raises:
        ExtensionBuildError: if it cannot be compiled, or not be loaded.
        SCAPError: if openvino_genai is not installed.
    """
    try:
        import openvino_genai
    except ImportError as error:
        raise SCAPError(
            f"openvino_genai cannot be imported ({first_line(error)}): pip install openvino-genai"
        ) from error
    library = library or build_extension()
    # All pipelines of a process share a core, which is theirs alone. It takes libraries from the properties of a
    # pipeline, before the model is looked for; here is none to be found.
    with tempfile.TemporaryDirectory(prefix="optimum-scap-") as nothing:
        try:
            openvino_genai.LLMPipeline(nothing, "CPU", extensions=[str(library)])
        except RuntimeError as error:
            if nothing not in str(error):
                raise ExtensionBuildError(f"the extension {library} cannot be loaded: {first_line(error)}") from error
    return library
