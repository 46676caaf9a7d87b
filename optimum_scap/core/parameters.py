"""SCAPParameters: what a calibration found, per layer. Their files are read and written in `parameter_files`.

Numbers are JSON. Vectors per channel are tensors: beside a JSON file they lie in a safetensors file of the same name,
in a checkpoint or an IR with the weights.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from ..errors import SCAPError, printable
from .config import (
    PATTERN,
    ApplyTo,
    DenseLayers,
    Estimator,
    IsNumber,
    SCAPConfig,
    Sparsity,
    Target,
)
from .criterion import Criterion
from .roles import OTHER, Role
from .sites import Site, sites_by_name


if TYPE_CHECKING:
    from numpy.typing import NDArray


# The name of the method in the quantization_config of a checkpoint.
QUANT_METHOD = "scap"

# scale: the criterion's factor per input channel, `[in_features]`; bias_correction: what is added to the layer's
# output, `[out_features]`. Both float32.
TensorName = Literal["scale", "bias_correction"]


def _representable(value: float) -> float:
    if not abs(value) <= float(np.finfo(np.float32).max):
        raise ValueError("is not a finite float32 value")
    return float(np.float32(value))


Float32 = Annotated[float, IsNumber, AfterValidator(_representable)]


class LayerParameters(BaseModel):
    """What SCAP needs to know about one fully connected layer, see `core.criterion`.

    Args:
        role: what the layer does in its block; None if that is not known.
        estimator: how the mode was estimated. (Files may say `method`, its former name.)
        target_sparsity: what was asked for.
        mode, threshold: float32 values of the criterion.
        tensors: the names of the vectors that belong to the layer, see `SCAPParameters.tensor`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Role | None = None
    estimator: Estimator = Field(validation_alias=AliasChoices("estimator", "method"))
    target_sparsity: Sparsity
    mode: Float32
    threshold: Annotated[Float32, Field(ge=0.0)]
    tensors: tuple[TensorName, ...] = ()

    @model_serializer(mode="wrap")
    def _without_nothing(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        if not content["tensors"]:
            del content["tensors"]
        return content

    @property
    def method(self) -> Estimator:
        """The former name of `estimator`."""
        return self.estimator

    @classmethod
    def of(cls, criterion: Criterion, role: Role | None, target: Target) -> "LayerParameters":
        """The parameters of a layer, without its tensors."""
        return cls(
            role=role,
            estimator=target.estimator,
            target_sparsity=target.sparsity,
            mode=float(criterion.mode),
            threshold=float(criterion.threshold),
        )


class _Tensors(dict[tuple[str, str], "NDArray[np.float32]"]):
    """Vectors by path and name, which can be compared."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, dict) or self.keys() != other.keys():
            return False
        return all(np.array_equal(value, other[key]) for key, value in self.items())

    __hash__ = None


class SCAPParameters(BaseModel):
    """The result of a calibration.

    Args:
        version: of the package that made it.
        config: what was asked for, with the data that were used; kept as a record, which only tables read again.
        apply_to, dense_layers: how the model is run, see SCAPConfig.
        sites: the layers that read one input, by module path; those that the user's patterns exclude are left out.
            None in files of earlier versions.
        layers: the parameters per module path.
        quantization_config: the `quantization_config` of the checkpoint below, as it was, if its weights are quantized
            by a method of their own; None for float weights.
    """

    model_config = ConfigDict(extra="forbid")

    version: str = Field(max_length=100)
    config: SCAPConfig
    apply_to: ApplyTo = "all"
    dense_layers: DenseLayers = "fast"
    sites: tuple[tuple[str, ...], ...] | None = None
    layers: dict[str, LayerParameters] = Field(min_length=1)
    quantization_config: dict[str, Any] | None = None

    _tensors: _Tensors = PrivateAttr(default_factory=_Tensors)

    @model_validator(mode="before")
    @classmethod
    def _options_of_earlier_versions(cls, content: Any) -> Any:
        """Earlier versions kept them in the config alone."""
        if not isinstance(content, dict):
            return content
        config = content.get("config")
        config = config if isinstance(config, dict) else config.model_dump() if isinstance(config, SCAPConfig) else {}
        options = {name: config[name] for name in ("apply_to", "dense_layers") if name in config}
        return {**options, **content}

    def found_sites(self) -> list[Site]:
        """The sites: those that were found, or what the names of the pruned layers tell."""
        if self.sites is None:
            return sites_by_name(self.layers)
        return [Site(paths) for paths in self.sites if paths]

    def group(self, path: str) -> str:
        """Under which name tables show the layer at `path`: its role; without one the `re:PATTERN` of the only target
        that it can have come from, else `other`.
        """
        layer = self.layers[path]
        if layer.role is not None:
            return layer.role
        # Patterns of a file from elsewhere are not run: they could take forever.
        named = [
            name
            for name, target in self.config.targets.items()
            if name.startswith(PATTERN)
            and (target.sparsity, target.estimator) == (layer.target_sparsity, layer.estimator)
        ]
        return named[0] if len(named) == 1 else OTHER

    def criterion(self, path: str) -> Criterion:
        """The criterion of the layer at `path`.

        Raises:
            SCAPError: if its scale is missing.
        """
        layer = self.layers[path]
        scale = self.tensor(path, "scale")
        return Criterion(np.float32(layer.mode), np.float32(layer.threshold), scale)

    def tensor(self, path: str, name: TensorName) -> "NDArray[np.float32] | None":
        """A vector of the layer at `path`; None if it has none of this name.

        Raises:
            SCAPError: if it should have one that is not there.
        """
        if name not in self.layers[path].tensors:
            return None
        found = self._tensors.get((path, name))
        if found is None:
            raise SCAPError(f"layer {printable(path)}: its {name} is missing from the SCAP parameters")
        return found

    def with_tensor(self, path: str, name: TensorName, value: Any) -> "SCAPParameters":
        """These parameters with a vector for the layer at `path`: a `scale` or a `bias_correction`.

        Args:
            path: the module path of a pruned layer.
            name: which vector.
            value: `[in_features]` or `[out_features]`, finite; a scale not negative.

        Raises:
            SCAPError: if the layer is not pruned, or the values are no such vector.
        """
        layer = self.layers.get(path)
        if layer is None:
            raise SCAPError(f"layer {printable(path)} is not pruned: it can have no {name}")
        with np.errstate(over="ignore"):
            vector = np.array(value, dtype=np.float32)
        if vector.ndim != 1 or vector.size == 0 or not np.isfinite(vector).all():
            raise SCAPError(f"layer {printable(path)}: its {name} is no vector of finite float32 values")
        if name == "scale" and (vector < 0).any():
            raise SCAPError(f"layer {printable(path)}: its scale has negative values")
        vector.flags.writeable = False
        names = (*(other for other in layer.tensors if other != name), name)
        changed = self.model_copy(
            update={"layers": {**self.layers, path: layer.model_copy(update={"tensors": tuple(sorted(names))})}}
        )
        changed._tensors = _Tensors({**self._tensors, (path, name): vector})
        return changed

    def named_tensors(self) -> dict[str, "NDArray[np.float32]"]:
        """All vectors, by `PATH.scap_NAME`: the names that they have in a checkpoint."""
        return {f"{path}.scap_{name}": value for (path, name), value in self._tensors.items()}

    def with_named_tensors(self, tensors: "Mapping[str, NDArray[np.float32]]") -> "SCAPParameters":
        """These parameters with the vectors that their layers say they have, from `named_tensors` or a checkpoint.

        Raises:
            SCAPError: if one is missing or is no such vector.
        """
        found = self
        for path, layer in self.layers.items():
            for name in layer.tensors:
                key = f"{path}.scap_{name}"
                if key not in tensors:
                    raise SCAPError(f"layer {printable(path)}: its {name} is missing from the SCAP parameters")
                found = found.with_tensor(path, name, tensors[key])
        return found

    def only(self, paths: Iterable[str]) -> "SCAPParameters":
        """The parameters of a part of the layers."""
        kept = set(paths)
        part = self.model_copy(update={"layers": {path: layer for path, layer in self.layers.items() if path in kept}})
        part._tensors = _Tensors({key: value for key, value in self._tensors.items() if key[0] in kept})
        return part

    def renamed(self, names: Mapping[str, str]) -> "SCAPParameters":
        """The same parameters for a model in which layers have other module paths."""
        sites = self.sites and tuple(tuple(names.get(path, path) for path in site) for site in self.sites)
        changed = self.model_copy(
            update={"layers": {names.get(path, path): layer for path, layer in self.layers.items()}, "sites": sites}
        )
        changed._tensors = _Tensors(
            {(names.get(path, path), name): value for (path, name), value in self._tensors.items()}
        )
        return changed

    @classmethod
    def merged(cls, parts: "Iterable[SCAPParameters]") -> "SCAPParameters":
        """The parameters of all `parts` (at least one) of a model as one."""
        first, *others = parts
        layers, tensors = dict(first.layers), _Tensors(first._tensors)
        sites = list(first.sites or ())
        for part in others:
            layers.update(part.layers)
            tensors.update(part._tensors)
            sites += [site for site in part.sites or () if site not in sites]
        all_have_sites = all(part.sites is not None for part in (first, *others))
        merged = first.model_copy(update={"layers": layers, "sites": tuple(sites) if all_have_sites else None})
        merged._tensors = tensors
        return merged
