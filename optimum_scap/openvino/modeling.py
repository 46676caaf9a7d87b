"""Drop-in versions of optimum-intel's model classes that run sparse models with the C++ operations.

    from optimum_scap import OVModelForCausalLM

`from_pretrained` and everything else are optimum-intel's. What differs is `compile()`: the threshold operations of a
sparse model are fused in a clone of each OpenVINO model, the clone is compiled, and the object keeps the portable
model, so that saving again writes what was loaded. A model without SCAP is compiled as it is. A model that was fused
before it was saved computes in f32 in the clone, if that is what OpenVINO is told to.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import openvino as ov
import optimum.intel
from optimum.intel.openvino import modeling_base

from ..core.config import DenseLayers
from ..errors import SCAPError, first_line
from .arithmetic import asked_group_size, preferred_group_size, preferred_precision
from .extension.build import ExtensionBuildError, build_extension
from .fuse import fuse, is_operation, set_attributes
from .fused_ir import is_fused, readable
from .optimum_intel import quiet_offline_guess
from .threshold_ops import find_threshold_ops


logger = logging.getLogger(__name__)


class SparseRuntimeMixin:
    """Makes an optimum-intel model class compile sparse models with the C++ operations."""

    @classmethod
    def from_pretrained(cls, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        """As in optimum-intel. Where it returns an architecture's own class, that class gets the fast runtime too.

        `dense_layers`: `fast`, `stock` or `all`, what becomes of layers that are not pruned, see SCAPConfig; by
        default what the model's parameters say.
        """
        quiet_offline_guess()
        dense_layers = kwargs.pop("dense_layers", None)
        if dense_layers not in (None, *get_args(DenseLayers)):
            raise SCAPError(f"dense_layers {dense_layers!r}: choose from {', '.join(get_args(DenseLayers))}")
        compile_now = kwargs.pop("compile", True)
        if kwargs.get("compile_only"):
            return super().from_pretrained(model_id, *args, **kwargs)  # type: ignore[misc]
        model = super().from_pretrained(model_id, *args, compile=False, **kwargs)  # type: ignore[misc]
        if not isinstance(model, SparseRuntimeMixin):
            stock: Any = type(model)
            model.__class__ = _with_sparse_runtime(stock)
        model._scap_dense_layers = dense_layers
        if compile_now:
            model.compile()
        return model

    def compile(self) -> Any:
        """Compiles the model, sparse layers with the C++ operations where they can be used."""
        with _fused(self):
            return super().compile()  # type: ignore[misc]

    @staticmethod
    def load_model(file_name: Any, *args: Any, **kwargs: Any) -> ov.Model:
        """As in optimum-intel. Reads fused IRs too, wherever they lie and whatever they are called."""
        _prepare_core(Path(file_name))
        try:
            return modeling_base.OVBaseModel.load_model(file_name, *args, **kwargs)
        except (RuntimeError, UnicodeDecodeError) as error:
            said = readable(error, Path(file_name))
            if said is error:
                raise
            raise said from error

    @staticmethod
    def _compile_model(
        model: Any, device: str | None = None, ov_config: dict[str, Any] | None = None, model_save_dir: Any = None
    ) -> Any:
        if isinstance(model, str | Path):  # compile_only=True never holds the model itself
            path = Path(model)
            model_save_dir = model_save_dir or path.parent
            model = fused_clone(SparseRuntimeMixin.load_model(path), device, ov_config)
        return optimum.intel.OVModelForCausalLM._compile_model(model, device, ov_config, model_save_dir)


def _prepare_core(path: Path) -> None:
    """Lets optimum-intel read the IR `path`, if it holds the operations already (`optimum-cli scap fuse`)."""
    if not is_fused(path):
        return
    try:
        extend_core(build_extension())
    except ExtensionBuildError as error:
        raise ExtensionBuildError(
            f"{path} is fused, it cannot be read without the extension: {error}; the folder that it was fused from "
            "runs without"
        ) from error


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


def fused_clone(
    model: ov.Model,
    device: str | None = "CPU",
    ov_config: dict[str, Any] | None = None,
    *,
    precision: str | None = None,
    dense_layers: DenseLayers | None = None,
) -> ov.Model:
    """A clone of `model` with its sparse layers fused; `model` itself where there is nothing to change or no way to.

    Args:
        model: any model; it is not changed. Operations that it holds already compute in f32, and with groups of
            activations as wide, as `ov_config` asks for in so many words.
        device: the operations exist for the CPU only.
        ov_config: what OpenVINO is told, see `arithmetic`.
        precision: that of the operations, instead of what `ov_config` asks for.
        dense_layers: what becomes of layers that are not pruned, see `fuse`.

    Raises:
        RuntimeError: OpenVINO does not know a value in `ov_config`.
    """
    held = [node for node in model.get_ops() if is_operation(node)]
    is_sparse = (device or "CPU").upper() == "CPU" and bool(find_threshold_ops(model))
    if not held and not is_sparse:
        return model
    precision = precision or preferred_precision(ov_config)
    asked = _asked_of_operations(precision, ov_config) if held else {}
    if any(node.get_attributes().get(name, "0") != value for node in held for name, value in asked.items()):
        model = model.clone()
        set_attributes(model, asked)
    if not is_sparse:
        return model
    clone = model.clone()
    try:
        library = build_extension()
        extend_core(library)
        report = fuse(
            clone,
            precision=precision,
            activation_group_size=preferred_group_size(ov_config),
            library=library,
            dense_layers=dense_layers,
        )
    except ExtensionBuildError as error:
        warnings.warn(f"SCAP runs with OpenVINO's own operations, at the dense speed: {error}", stacklevel=2)
        return model
    logger.debug("fused %d layers, kept %d", len(report.fused), len(report.kept))
    return clone if report.fused else model


def _asked_of_operations(precision: str, ov_config: dict[str, Any] | None) -> dict[str, str]:
    """The attributes that operations get that were made before."""
    group_size = asked_group_size(ov_config)
    asked = {} if group_size is None else {"activation_group_size": str(group_size)}
    return asked | ({"precision": precision} if precision == "f32" else {})


@contextmanager
def _fused(model: Any) -> Iterator[None]:
    """Puts fused clones in the place of the OpenVINO models inside `model` and of its parts, and restores them."""
    if getattr(model, "_compile_only", False):
        yield
        return
    dense_layers = getattr(model, "_scap_dense_layers", None)
    hosts = [model, *model.components.values()]
    held = [(host, name, value) for host in hosts for name, value in vars(host).items() if isinstance(value, ov.Model)]
    clones: dict[int, ov.Model] = {}
    for host, name, value in held:
        if getattr(host, "request", None) is None:
            if id(value) not in clones:
                clones[id(value)] = fused_clone(
                    value, getattr(host, "_device", "CPU"), host.ov_config, dense_layers=dense_layers
                )
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
