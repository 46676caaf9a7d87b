"""Drop-in versions of optimum-intel's model classes that run sparse models with the C++ operations.

    from optimum_scap import OVModelForCausalLM

`from_pretrained` and everything else are optimum-intel's. What differs is `compile()`: the threshold operations of a
sparse model are fused in a clone of each OpenVINO model, the clone is compiled, and the object keeps the portable
model, so that saving again writes what was loaded. A model without SCAP is compiled as it is.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import openvino as ov
import optimum.intel
from optimum.intel.openvino import modeling_base

from ..errors import first_line
from .extension.build import ExtensionBuildError, build_extension
from .fusion import fuse
from .threshold_ops import find_threshold_ops


logger = logging.getLogger(__name__)

_OPSET_MARK = b'version="optimum_scap"'


class SparseRuntimeMixin:
    """Makes an optimum-intel model class compile sparse models with the C++ operations."""

    @classmethod
    def from_pretrained(cls, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        """As in optimum-intel. Where it returns an architecture's own class, that class gets the fast runtime too."""
        _read_fused_folders(model_id)
        compile_now = kwargs.pop("compile", True)
        if kwargs.get("compile_only"):
            return super().from_pretrained(model_id, *args, **kwargs)  # type: ignore[misc]
        model = super().from_pretrained(model_id, *args, compile=False, **kwargs)  # type: ignore[misc]
        if not isinstance(model, SparseRuntimeMixin):
            stock: Any = type(model)
            model.__class__ = _with_sparse_runtime(stock)
        if compile_now:
            model.compile()
        return model

    def compile(self) -> Any:
        """Compiles the model, sparse layers with the C++ operations where they can be used."""
        with _fused(self):
            return super().compile()  # type: ignore[misc]

    @staticmethod
    def _compile_model(
        model: Any, device: str | None = None, ov_config: dict[str, str] | None = None, model_save_dir: Any = None
    ) -> Any:
        if isinstance(model, str | Path):  # compile_only=True never holds the model itself
            path = Path(model)
            model_save_dir = model_save_dir or path.parent
            model = fused_clone(modeling_base.core.read_model(path), device, ov_config)
        return optimum.intel.OVModelForCausalLM._compile_model(model, device, ov_config, model_save_dir)


def _read_fused_folders(model_id: Any) -> None:
    """Lets optimum-intel read a folder whose IR holds the operations already (`optimum-cli scap fuse`)."""
    folder = Path(str(model_id))
    if folder.is_dir() and any(_OPSET_MARK in path.read_bytes() for path in folder.glob("openvino_*.xml")):
        extend_core(build_extension())


@lru_cache
def extend_core(library: Path) -> None:
    """Lets the core that optimum-intel compiles with read the operations: from an IR, and from the model cache.

    Raises:
        ExtensionBuildError: if the library cannot be loaded, for example from a disk mounted noexec.
    """
    try:
        modeling_base.core.add_extension(str(library))
    except RuntimeError as error:
        raise ExtensionBuildError(f"the extension {library} cannot be loaded: {first_line(error)}") from error


def fused_clone(model: ov.Model, device: str | None = "CPU", ov_config: dict[str, str] | None = None) -> ov.Model:
    """A clone of `model` with its sparse layers fused; `model` itself where there is nothing to fuse or no way to.

    Args:
        model: any model; it is not changed.
        device: the operations exist for the CPU only.
        ov_config: an `INFERENCE_PRECISION_HINT` of f32 asks for f32 arithmetic.
    """
    if (device or "CPU").upper() != "CPU" or not find_threshold_ops(model):
        return model
    clone = model.clone()
    try:
        library = build_extension()
        extend_core(library)
        report = fuse(clone, precision=preferred_precision(ov_config), library=library)
    except ExtensionBuildError as error:
        warnings.warn(f"SCAP runs with OpenVINO's own operations, at the dense speed: {error}", stacklevel=2)
        return model
    logger.debug("fused %d layers, kept %d", len(report.fused), len(report.kept))
    return clone if report.fused else model


def preferred_precision(ov_config: dict[str, str] | None = None) -> str:
    """f32 if asked for; else what OpenVINO would do with many rows on this CPU: bf16 where it is native."""
    hint = str((ov_config or {}).get("INFERENCE_PRECISION_HINT", "")).lower()
    if "f32" in hint or "float32" in hint:
        return "f32"
    return "bf16" if _prefers_bf16() else "split"


@lru_cache
def _prefers_bf16() -> bool:
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@contextmanager
def _fused(model: Any) -> Iterator[None]:
    """Puts fused clones in the place of the OpenVINO models inside `model` and of its parts, and restores them."""
    if getattr(model, "_compile_only", False):
        yield
        return
    hosts = [model, *model.components.values()]
    held = [(host, name, value) for host in hosts for name, value in vars(host).items() if isinstance(value, ov.Model)]
    clones: dict[int, ov.Model] = {}
    for host, name, value in held:
        if getattr(host, "request", None) is None:
            if id(value) not in clones:
                clones[id(value)] = fused_clone(value, getattr(host, "_device", "CPU"), host.ov_config)
            setattr(host, name, clones[id(value)])
    try:
        yield
    finally:
        for host, name, value in held:
            setattr(host, name, value)


@lru_cache
def _with_sparse_runtime(cls: Any) -> Any:
    """`cls` with the fast runtime, under the same name."""
    return type(cls.__name__, (SparseRuntimeMixin, cls), {"__module__": __name__, "__doc__": cls.__doc__})


OVModelForCausalLM = _with_sparse_runtime(optimum.intel.OVModelForCausalLM)
OVModelForFeatureExtraction = _with_sparse_runtime(optimum.intel.OVModelForFeatureExtraction)
OVModelForImageClassification = _with_sparse_runtime(optimum.intel.OVModelForImageClassification)
OVModelForMaskedLM = _with_sparse_runtime(optimum.intel.OVModelForMaskedLM)
OVModelForQuestionAnswering = _with_sparse_runtime(optimum.intel.OVModelForQuestionAnswering)
OVModelForSeq2SeqLM = _with_sparse_runtime(optimum.intel.OVModelForSeq2SeqLM)
OVModelForSequenceClassification = _with_sparse_runtime(optimum.intel.OVModelForSequenceClassification)
OVModelForTokenClassification = _with_sparse_runtime(optimum.intel.OVModelForTokenClassification)
