"""What a framework has to do so that the algorithm in `calibration` can run on its models. Implemented twice."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import SCAPError, printable
from ..progress import length, run_over
from .config import SCAPConfig
from .criterion import Criterion
from .measuring import SkippedChannels
from .parameters import SCAPParameters
from .sites import Layer, Layers, Site, match_paths
from .statistics import ActivationStatistics
from .targets import Group


if TYPE_CHECKING:
    from numpy.typing import NDArray


# visit(group key, activations), the activations being of the kind that the backend's statistics take
Visit = Callable[[str, Any], None]
# add(module path, sum over tokens of the fraction of channels skipped, number of tokens)
Add = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Learned:
    """What a model learned beside its thresholds.

    Args:
        criteria: the learned ones, by group key; their total is near the one that was asked for.
        biases: what is added to a layer's output, float32 `[out_features]`, by module path.
        gains: what kept channels are multiplied by, float32 `[in_features]`, by module path.
    """

    criteria: Mapping[str, Criterion]
    biases: "Mapping[str, NDArray[np.float32]]" = field(default_factory=dict)
    gains: "Mapping[str, NDArray[np.float32]]" = field(default_factory=dict)


class Backend(ABC):
    """One model of one framework. Nothing is changed in it but by `apply`."""

    statistics: type[ActivationStatistics] = ActivationStatistics

    @abstractmethod
    def layers(self) -> Layers:
        """The fully connected layers of the model.

        Raises:
            SCAPError: if the model is sparse already, or is of a kind that cannot be pruned.
        """

    @abstractmethod
    def find_sites(self, layers: Layers, samples: Iterable[Any]) -> list[Site]:
        """Every prunable layer in exactly one site. `samples` show what a model without a graph computes.

        Raises:
            SCAPError: if there are no samples, or the model cannot run on one.
        """

    @abstractmethod
    def channel_norms(self, paths: Sequence[str]) -> "NDArray[np.float32]":
        """The Euclidean norm of each input channel's weights over the layers at `paths`, `[in_features]`."""

    @abstractmethod
    def collector(self, groups: Sequence[Group], scales: "Mapping[str, NDArray[np.float32]]") -> "Collector":
        """What runs the model with criteria in force; `scales` by group key are those of all criteria to come."""

    @abstractmethod
    def apply(self, parameters: SCAPParameters) -> None:
        """Makes the layers prune their inputs, in place.

        Raises:
            SCAPError: if a layer cannot be pruned; the model is untouched then.
        """

    @abstractmethod
    def counter(self) -> "Counter | None":
        """What counts skipped channels in a sparse model; None if the model is dense."""

    def check_can_learn(self, config: SCAPConfig, paths: Iterable[str]) -> None:
        """Checks that what `config` says can be learned by the layers at `paths`.

        Raises:
            SCAPError: otherwise, saying what to do.
        """
        raise SCAPError(
            "thresholds, biases and gains are learned by PyTorch models: optimum-cli export openvino learns before it "
            "exports; for this model, apply the parameters that one in PyTorch has learned, with recalibrate"
        )

    def learn(
        self,
        groups: Sequence[Group],
        criteria: Mapping[str, Criterion],
        weights: Mapping[str, int],
        samples: Sequence[Any],
        config: SCAPConfig,
    ) -> Learned:
        """Learns what `config` says against the dense model, at the total that `groups` ask for.

        Args:
            groups: what is pruned.
            criteria: calibrated ones to start from, by group key.
            weights: how many each group reads, by group key.
            samples: model inputs, all that there are to learn from.
            config: what to learn, and how long.

        Raises:
            SCAPError: if the model or the samples cannot be learned with.
        """
        raise NotImplementedError

    def adjusted(self, learned: Learned) -> AbstractContextManager[None]:
        """A context in which biases and gains are in force; criteria are not."""
        raise NotImplementedError

    def fold(self, learned: Learned) -> None:
        """Folds the gains into the weights, for good."""
        raise NotImplementedError

    def check_can_apply(self, parameters: SCAPParameters, layers: Layers) -> None:
        """Checks that the vectors of `parameters`, all of whose layers are in `layers`, fit these.

        Raises:
            SCAPError: naming the layer and the vector.
        """
        for path in parameters.layers:
            check_fits(layers.prunable[path], parameters)

    def check_can_be_saved(self) -> None:  # noqa: B027  most can
        """Checks that the model could be saved with what a calibration finds.

        Raises:
            SCAPError: otherwise, saying what to do.
        """


class Collector(ABC):
    """Runs a model over samples with criteria in force. A context: what it does to the model ends with it."""

    def __enter__(self) -> "Collector":
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027
        pass

    @abstractmethod
    def set(self, criteria: Mapping[str, Criterion]) -> None:
        """Puts criteria (by group key) in force."""

    @abstractmethod
    def run(self, sample: Any, visit: Visit) -> None:
        """Calls `visit` with what enters each group, before it is pruned and without padding."""


class Counter(ABC):
    """Runs a sparse model over samples and counts what its layers skip. A context, as Collector is."""

    def __enter__(self) -> "Counter":
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027
        pass

    @abstractmethod
    def run(self, sample: Any, add: Add) -> None:
        """Calls `add` for every pruned layer that the sample reaches; padding does not count."""


def measure_sparsity(backend: Backend, samples: Iterable[Any], total: int | None = None) -> dict[str, float]:
    """The fraction of input channels that each pruned layer skips on `samples`, per module path.

    Every token counts alike, padding not at all; a layer that no token reaches is left out. Of a layer that is pruned
    in decode only, the fraction that decoding the same tokens one by one would prune.

    Args:
        backend: of a sparse model.
        samples: model inputs.
        total: the number of samples, where they do not tell, for the progress bar.

    Raises:
        SCAPError: if there are no samples, or the model cannot run on one.
    """
    counter = backend.counter()
    if counter is None:
        return {}
    skipped = SkippedChannels()
    with counter:
        count = run_over(
            samples, lambda sample: counter.run(sample, skipped.add), total or length(samples), "Sparsity"
        )
    if count == 0:
        raise SCAPError("the dataset to measure sparsity on is empty")
    return skipped.fractions()


def apply_parameters(backends: Mapping[str, Backend], parameters: SCAPParameters) -> None:
    """Applies parameters that are known, without calibration, to a model or several that work together.

    Raises:
        SCAPError: if one is sparse already, or none of them has a layer that `parameters` name; nothing is changed.
    """
    if len(backends) == 1:
        for backend in backends.values():
            backend.apply(parameters)
        return
    paths = {name: backend.layers().prunable for name, backend in backends.items()}
    present = [path for named in paths.values() for path in named]
    names = match_paths(parameters.layers, present)
    check_all_exist(names, present)
    for name, backend in backends.items():
        own = [path for path in parameters.layers if names[path] in paths[name]]
        if own:
            backend.apply(parameters.only(own))


def check_fits(layer: Layer, parameters: SCAPParameters) -> None:
    """Checks that the vectors of a layer have an element per channel.

    Raises:
        SCAPError: naming the layer and the vector.
    """
    for name, wanted in (("scale", layer.in_features), ("bias_correction", layer.out_features)):
        value = parameters.tensor(layer.path, name)  # type: ignore[arg-type]
        if value is not None and value.shape != (wanted,):
            raise SCAPError(
                f"layer {printable(layer.path)}: its {name} has {value.size} values, the layer needs {wanted}"
            )


def check_all_exist(names: Mapping[str, str | None], present: Sequence[str]) -> None:
    """Checks that each path of parameters was found in a model.

    Raises:
        SCAPError: naming the first that was not.
    """
    missing = [path for path, name in names.items() if name is None]
    if missing:
        others = f" (nor do {len(missing) - 1} others of {len(names)})" if len(missing) > 1 else ""
        raise SCAPError(
            f"layer {printable(missing[0])} does not exist in the model{others}; the model has, for example, "
            f"{printable(present[0])}"
        )
