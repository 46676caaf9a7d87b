"""SCAPConfig: what to prune, how much, and how to calibrate. It validates itself and round-trips through JSON."""

import re
import reprlib
from collections.abc import Iterable
from itertools import islice
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from ..errors import SCAPError, first_line, printable
from .roles import FFN_ROLES, ROLES, Role


Estimator = Literal["zero", "mean", "median", "kde"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

ChannelScale = Literal["none", "weight_norm", "sqrt_weight_norm"]
ApplyTo = Literal["all", "decode"]
# With `apply_to="decode"`, more sequences at a time are dense: for so many rows our operations read all weights.
MOST_DECODED_SEQUENCES = 8
DenseLayers = Literal["fast", "stock", "all"]
Experts = Literal["shared", "each"]
EXPERTS: tuple[Experts, ...] = get_args(Experts)
Part = Literal["thresholds", "biases", "gains"]
PARTS: tuple[Part, ...] = get_args(Part)

# What marks a key of `targets` as a pattern on module paths, as in compressed-tensors.
PATTERN = "re:"

# Patterns, names and counts are bounded far above anything of use, so that a damaged file is refused, not worked on.
_LONGEST_PATTERN = 100_000
_LARGEST_COUNT = 2**31 - 1
_LARGEST_SEED = 2**63 - 1


def _a_number(value: Any) -> Any:
    """pydantic takes true for 1 and "0.5" for 0.5; a file that says so is damaged."""
    if isinstance(value, bool | str | bytes):
        raise ValueError("Input should be a number")
    return value


IsNumber = BeforeValidator(_a_number)
Sparsity = Annotated[float, IsNumber, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
Count = Annotated[int, IsNumber, Field(ge=1, le=_LARGEST_COUNT)]


class Target(BaseModel):
    """What is asked of a layer.

    Args:
        sparsity: the fraction of input channels to prune per token, in [0, 1).
        estimator: how the mode of the activations is estimated. (Files and callers may say `mode`, its former name.)
        scale: what a channel's distance from the mode is multiplied by before it is compared: `none`, `weight_norm`
            (the Euclidean norm of the channel's weights, of all layers that read it, over its mean) or
            `sqrt_weight_norm` (its square root): a channel with small weights may then be pruned sooner.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sparsity: Sparsity
    estimator: Estimator = Field("zero", validation_alias=AliasChoices("estimator", "mode"))
    scale: ChannelScale = "none"

    @property
    def mode(self) -> Estimator:
        """The former name of `estimator`."""
        return self.estimator


RoleTarget = Target  # its former name


class SCAPConfig(BaseModel):
    """What to prune and how to calibrate it.

    Args:
        targets: the target sparsity and the estimator of the mode, per role (see `core.roles.ROLES`) or, stronger, per
            `re:PATTERN`, a regular expression searched in module paths; of several patterns that match the first
            counts. A bare number stands for the estimator `zero`. A layer with sparsity 0 is left dense.
        include: regular expressions searched in module paths; when given, only layers that one of them matches are
            pruned.
        exclude: regular expressions searched in module paths; layers that one of them matches stay dense.
        roles: what layers do whose names `core.roles` does not know, or to overrule what it says: a role by regular
            expression searched in module paths; of several patterns that match the first counts.
        experts: whether the experts of a layer of a mixture share their thresholds, or each has its own; one that sees
            few tokens of the calibration data has those of all of them.
        dataset: what to calibrate on when no dataset object is passed: a name that optimum's dataset helper
            knows, a local .txt, .jsonl, .json or .parquet file, or `auto` (text that the model itself generates).
        num_samples: number of calibration samples.
        seq_len: tokens per calibration sample.
        seed: seed of every random choice made during calibration.
        apply_to: `all` prunes every forward; `decode` only those of one token per sequence and of up to 8 sequences,
            and leaves others dense, where pruning saves no time. Calibration prunes every forward either way.
        dense_layers: what becomes of layers that are not pruned: `fast` lets our runtimes run them with operations of
            ours where those are faster, but for layers that the patterns exclude; `all` these too; `stock` none.
        total: the sparsity of all layers to prune together, weighted by their weights; the targets then say how it is
            distributed at first. None takes the total of the targets.
        learn: what is learned against the logits of the dense model, see `torch.learned`; nothing, as published, by
            default. `thresholds` distributes the total over the layers; `biases` corrects the outputs of pruned
            layers; `gains` scales what their kept channels contribute, folded into floating-point weights.
        learn_steps: steps of learning, unless it stops early.
        learn_samples: number of samples to learn from, of which a part is held out; thresholds are calibrated on the
            first `num_samples` of them.
        learn_tokens: tokens per step.

    Raises:
        pydantic.ValidationError: (a ValueError) naming the field that is wrong.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    targets: dict[str, Target] = Field(min_length=1)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    roles: dict[str, Role] = Field(default_factory=dict)
    experts: Experts = "shared"
    dataset: str = "auto"
    num_samples: Count = 64
    seq_len: Count = 256
    seed: Annotated[int, IsNumber, Field(ge=0, le=_LARGEST_SEED)] = 42
    apply_to: ApplyTo = "all"
    dense_layers: DenseLayers = "fast"
    total: Annotated[float, IsNumber, Field(gt=0.0, lt=1.0, allow_inf_nan=False)] | None = None
    learn: tuple[Part, ...] = ()
    learn_steps: Count = 300
    learn_samples: Count = 512
    learn_tokens: Count = 4096

    @field_validator("targets", mode="before")
    @classmethod
    def _numbers_are_targets(cls, targets: Any) -> Any:
        if not isinstance(targets, dict):
            return targets
        for name in targets:
            if name not in ROLES and not (isinstance(name, str) and name.startswith(PATTERN)):
                raise ValueError(
                    f"unknown role {shortened(name)}, choose from {', '.join(ROLES)}, or give {PATTERN}REGEX"
                )
        return {
            name: target if isinstance(target, dict | Target) else {"sparsity": target}
            for name, target in targets.items()
        }

    @field_validator("targets")
    @classmethod
    def _something_to_prune(cls, targets: dict[str, Target]) -> dict[str, Target]:
        _check_patterns(name.removeprefix(PATTERN) for name in targets if name.startswith(PATTERN))
        if all(target.sparsity == 0 for target in targets.values()):
            raise ValueError("every role has sparsity 0, there is nothing to prune")
        return targets

    @field_validator("include", "exclude")
    @classmethod
    def _patterns_compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        _check_patterns(patterns)
        return patterns

    @field_validator("roles")
    @classmethod
    def _patterns_of_roles_compile(cls, roles: dict[str, Role]) -> dict[str, Role]:
        _check_patterns(roles)
        return roles

    @model_serializer(mode="wrap")
    def _without_what_is_not_given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Versions that do not know a field refuse files that hold it."""
        content: dict[str, Any] = serialize(self)
        if not content.get("roles"):
            content.pop("roles", None)
        if content.get("experts") == "shared":
            del content["experts"]
        if not self.learn:
            for field in ("learn", "learn_steps", "learn_samples", "learn_tokens"):
                content.pop(field, None)
        if self.total is None:
            content.pop("total", None)
        return content

    def role(self, path: str, known: Role | None) -> Role | None:
        """What the layer at `path` does: what `roles` say, else `known`."""
        return next((role for pattern, role in self.roles.items() if re.search(pattern, path)), known)

    @field_validator("learn")
    @classmethod
    def _no_part_twice(cls, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        if len(set(parts)) < len(parts):
            raise ValueError("a part is given twice")
        return tuple(part for part in PARTS if part in parts)

    @model_validator(mode="after")
    def _gains_are_in_the_weights(self) -> "SCAPConfig":
        if "gains" in self.learn and self.apply_to == "decode":
            raise ValueError(
                "learn: gains are folded into the weights, which the dense forwards of apply_to decode read as well; "
                "learn thresholds and biases"
            )
        return self

    def pattern_targets(self) -> dict[str, Target]:
        """The targets of module paths, by regular expression."""
        found = {name: target for name, target in self.targets.items() if name.startswith(PATTERN)}
        return {name.removeprefix(PATTERN): target for name, target in found.items()}

    @classmethod
    def from_spec(cls, spec: str, mode: str | None = None, **fields: Any) -> "SCAPConfig":
        """Builds a config from the specification string of the command line.

        Args:
            spec: a number (`0.5`, every FFN role), pairs (`up=0.35,gate=0.35,down=0.55`), of which some may be
                `re:PATTERN=0.2` for layers by module path (patterns without commas), or the triplets of the reference
                implementation (`up,zero,0.35,gate,zero,0.35,down,kde,0.55`).
            mode: the estimator of the mode where `spec` names none: one, or pairs `down=kde,up=zero`.
            fields: the other fields of SCAPConfig.

        Raises:
            SCAPError: one line that says which part is wrong.
        """
        targets = _parse_targets(spec)
        modes = _parse_modes(mode, tuple(targets))
        entries = {
            role: {"sparsity": sparsity, "estimator": named_mode or modes.get(role, "zero")}
            for role, (named_mode, sparsity) in targets.items()
        }
        try:
            return cls.model_validate({"targets": entries, **fields})
        except ValidationError as error:
            raise SCAPError(describe_validation_error(error)) from error


def _check_patterns(patterns: Iterable[str]) -> None:
    for pattern in patterns:
        if len(pattern) > _LONGEST_PATTERN:
            raise ValueError(f"a pattern is longer than {_LONGEST_PATTERN} characters")
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{shortened(pattern)} is not a regular expression: {printable(first_line(error))}"
            ) from error


def describe_validation_error(error: ValidationError) -> str:
    """The problems that pydantic found as one line: `field: what is wrong`, joined by semicolons."""
    problems = []
    for problem in islice(error.errors(include_url=False), 4):
        field = printable(".".join(str(part) for part in problem["loc"]))
        message = printable(problem["msg"].removeprefix("Value error, "), 1000)
        # What lacks a field may be a whole file.
        got = "" if problem["type"] == "missing" else f" (got {shortened(problem['input'])})"
        problems.append(f"{field}: {message}{got}" if field else message)
    more = [f"and {error.error_count() - 3} more"] if error.error_count() > 3 else []
    return "; ".join(problems[:3] + more)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


def shortened(value: Any) -> str:
    """The repr of what a file or a user gave, whatever its size and depth, for a message of one line."""
    if isinstance(value, int) and value.bit_length() > 300:
        return "a number of many digits"
    return printable(_REPR.repr(value), 103)


def _parse_targets(spec: str) -> dict[str, tuple[str | None, float]]:
    """{role: (mode or None, sparsity)} from any of the three forms; sparsities are not checked for their range."""
    spec = spec.strip()
    try:
        return {role: (None, float(spec)) for role in FFN_ROLES}
    except ValueError:
        pass
    parts = [part.strip() for part in spec.split(",")]
    if "=" in spec:
        entries: list[tuple[str, str | None, str]] = []
        for part in parts:
            # A pattern may hold the sign itself.
            role, equals, sparsity = (piece.strip() for piece in part.rpartition("="))
            if not equals:
                raise SCAPError(
                    f"SCAP specification {shortened(spec)}: {shortened(part)} is not of the form role=sparsity"
                )
            entries.append((role, None, sparsity))
    else:
        if len(parts) % 3:
            raise SCAPError(
                f"SCAP specification {shortened(spec)}: expected a number, role=sparsity pairs, or triplets "
                f"role,mode,sparsity; got {len(parts)} comma-separated values, which is not a multiple of three"
            )
        entries = [(parts[i], parts[i + 1], parts[i + 2]) for i in range(0, len(parts), 3)]

    targets: dict[str, tuple[str | None, float]] = {}
    for role, mode, sparsity in entries:
        if role not in ROLES and not role.startswith(PATTERN):
            raise SCAPError(
                f"SCAP specification {shortened(spec)}: unknown role {shortened(role)}, choose from {', '.join(ROLES)}"
            )
        if mode is not None and mode not in ESTIMATORS:
            raise SCAPError(
                f"SCAP specification {shortened(spec)}: unknown mode {shortened(mode)}, choose from "
                f"{', '.join(ESTIMATORS)}"
            )
        if role in targets:
            raise SCAPError(f"SCAP specification {shortened(spec)}: role {shortened(role)} is given twice")
        try:
            targets[role] = (mode, float(sparsity))
        except ValueError:
            raise SCAPError(
                f"SCAP specification {shortened(spec)}: {shortened(sparsity)} is not a number (role {shortened(role)})"
            ) from None
    return targets


def _parse_modes(mode: str | None, roles: tuple[str, ...]) -> dict[str, str]:
    if mode is None:
        return {}
    modes: dict[str, str] = {}
    for part in mode.split(","):
        role, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals:
            role, name = "", role
        if name not in ESTIMATORS:
            raise SCAPError(
                f"mode {shortened(mode)}: unknown mode {shortened(name)}, choose from {', '.join(ESTIMATORS)}"
            )
        if role and role not in roles:
            given = ", ".join(roles)
            raise SCAPError(
                f"mode {shortened(mode)}: role {shortened(role)} has no target sparsity (roles given: {given})"
            )
        modes.update({role: name} if role else dict.fromkeys(roles, name))
    return modes
