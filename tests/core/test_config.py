import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from optimum_scap import RoleTarget, SCAPConfig, SCAPError
from optimum_scap.core.config import ESTIMATORS
from optimum_scap.core.presets import PRESETS, Preset, preset_fields
from optimum_scap.core.roles import ROLES


def test_a_number_targets_every_ffn_role() -> None:
    config = SCAPConfig.from_spec("0.5")
    assert config.targets == {role: RoleTarget(sparsity=0.5) for role in ("up", "gate", "down")}


def test_pairs_and_triplets() -> None:
    pairs = SCAPConfig.from_spec("up=0.35, gate=0.35,down=0.55", mode="down=kde")
    triplets = SCAPConfig.from_spec("up,zero,0.35,gate,zero,0.35,down,kde,0.55")
    assert pairs == triplets
    assert pairs.targets["down"] == RoleTarget(sparsity=0.55, mode="kde")


def test_the_mode_flag_fills_in_and_does_not_override() -> None:
    assert SCAPConfig.from_spec("0.5", mode="median").targets["up"].mode == "median"
    assert SCAPConfig.from_spec("up,mean,0.5", mode="median").targets["up"].mode == "mean"


@pytest.mark.parametrize(
    ("spec", "mode", "message"),
    [
        ("side=0.5", None, "unknown role 'side'"),
        ("up=1.0", None, "targets.up.sparsity: Input should be less than 1"),
        ("up=-0.1", None, "targets.up.sparsity"),
        ("nan", None, "sparsity"),
        ("1.5", None, "less than 1"),
        ("up,zero", None, "not a multiple of three"),
        ("up,zero,0.5,down", None, "not a multiple of three"),
        ("up,zeroes,0.5", None, "unknown mode 'zeroes'"),
        ("up,zero,half", None, "'half' is not a number"),
        ("up=0.5,up=0.4", None, "given twice"),
        ("up=0.5,down", None, "'down' is not of the form"),
        ("", None, "expected a number"),
        ("0", None, "nothing to prune"),
        ("0.5", "mode", "unknown mode 'mode'"),
        ("up=0.5", "down=kde", "'down' has no target"),
    ],
)
def test_bad_specifications_say_what_is_wrong_in_one_line(spec: str, mode: str | None, message: str) -> None:
    with pytest.raises(SCAPError) as caught:
        SCAPConfig.from_spec(spec, mode=mode)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"targets": {}}, "targets"),
        ({"targets": {"up": 0.5}, "num_samples": 0}, "num_samples"),
        ({"targets": {"up": 0.5}, "exclude": ("(",)}, "exclude"),
        ({"targets": {"up": 0.5}, "sparsity": 1}, "sparsity"),
        ({"targets": {"up": {"sparsity": 0.5, "mode": "max"}}}, "targets.up.mode"),
        ({"targets": {"up": True}}, "targets.up.sparsity\n.*should be a number"),
        ({"targets": {"up": "0.5"}}, "targets.up.sparsity\n.*should be a number"),
        ({"targets": {"up": {"sparsity": False}, "down": 0.5}}, "targets.up.sparsity\n.*should be a number"),
        ({"targets": {"up": float("nan")}}, "targets.up.sparsity"),
        ({"targets": {"up": 10**400}}, "targets.up.sparsity"),
        ({"targets": {"up": 0.5}, "num_samples": True}, "num_samples\n.*should be a number"),
        ({"targets": {"up": 0.5}, "seq_len": "64"}, "seq_len\n.*should be a number"),
        ({"targets": {"up": 0.5}, "seed": 2**63}, "seed"),
        ({"targets": {"up": 0.5}, "num_samples": 10**400}, "num_samples"),
        ({"targets": {"up": 0.5}, "include": "mlp"}, "include"),
        ({"targets": {"up": 0.5}, "include": ("(" * 5000 + ")" * 5000,)}, "include\n.*not a regular expression"),
        ({"targets": {"up": 0.5}, "include": ("a{99999999999999999999}",)}, "include\n.*not a regular expression"),
        ({"targets": {"up": 0.5}, "exclude": ("a" * 100_001,)}, "exclude\n.*longer than"),
    ],
)
def test_validation_names_the_field(fields: dict, named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        SCAPConfig(**fields)


@given(
    targets=st.dictionaries(
        st.sampled_from(ROLES),
        st.builds(RoleTarget, sparsity=st.floats(0.01, 0.999), mode=st.sampled_from(ESTIMATORS)),
        min_size=1,
    ),
    num_samples=st.integers(1, 1000),
    exclude=st.lists(st.sampled_from([r"layers\.0\.", "mlp", "^model"])),
)
def test_json_and_triplets_round_trip(targets: dict, num_samples: int, exclude: list[str]) -> None:
    config = SCAPConfig(targets=targets, num_samples=num_samples, exclude=tuple(exclude))
    assert SCAPConfig.model_validate_json(config.model_dump_json()) == config
    spec = ",".join(f"{role},{target.mode},{target.sparsity!r}" for role, target in targets.items())
    assert SCAPConfig.from_spec(spec).targets == config.targets


@given(st.text(max_size=40))
def test_no_text_crashes_the_parser(spec: str) -> None:
    check_parser(spec, None)


PIECES = st.sampled_from(
    [*ROLES, *ESTIMATORS, "0.5", "1e-3", "nan", "1_0", "-0", ",", "=", " ", "\n", "٣", "\x00", "\ud800"]
)


@given(st.lists(PIECES, max_size=12).map("".join), st.none() | st.lists(PIECES, max_size=6).map("".join))
def test_no_specification_crashes_the_parser(spec: str, mode: str | None) -> None:
    check_parser(spec, mode)


def check_parser(spec: str, mode: str | None) -> None:
    try:
        config = SCAPConfig.from_spec(spec, mode=mode)
    except SCAPError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return
    assert config.targets
    triplets = ",".join(f"{role},{target.mode},{target.sparsity!r}" for role, target in config.targets.items())
    assert SCAPConfig.from_spec(triplets) == config
    assert SCAPConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("spec", ["up=" + "9" * 100_000, "x" * 100_000, "up,zero,0.5," * 10_000 + "up"])
def test_long_specifications_are_not_recited(spec: str) -> None:
    with pytest.raises(SCAPError) as caught:
        SCAPConfig.from_spec(spec)
    assert len(str(caught.value)) < 1000


def test_what_is_learned_is_part_of_the_config() -> None:
    config = SCAPConfig.from_spec("0.5", total=0.45, learn=("biases", "thresholds"), learn_steps=40, learn_tokens=1024)
    assert config.learn == ("thresholds", "biases")
    assert SCAPConfig.model_validate_json(config.model_dump_json()) == config
    assert SCAPConfig.from_spec("0.5").learn == () and SCAPConfig.from_spec("0.5").total is None


def test_configs_of_earlier_versions_learn_nothing() -> None:
    content = SCAPConfig.from_spec("0.5").model_dump()
    # Nor can they read what they do not know.
    assert not content.keys() & {"total", "learn", "learn_steps", "learn_samples", "learn_tokens", "roles", "experts"}
    assert SCAPConfig.model_validate(content) == SCAPConfig.from_spec("0.5")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learn": ("weights",)}, "learn"),
        ({"learn": ("biases", "biases")}, "learn: a part is given twice"),
        ({"learn": ("gains",), "apply_to": "decode"}, "gains are folded into the weights"),
        ({"total": 0.0}, "total"),
        ({"total": 1.0}, "total"),
        ({"total": True}, "total: Input should be a number"),
        ({"learn_steps": 0}, "learn_steps"),
    ],
)
def test_what_cannot_be_learned_is_named(fields: dict, message: str) -> None:
    with pytest.raises(SCAPError, match=message):
        SCAPConfig.from_spec("0.5", **fields)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_configs(preset: Preset) -> None:
    config = SCAPConfig.from_spec("0.5", **preset_fields(preset))
    expected = {"published": (), "balanced": ("thresholds", "biases"), "quality": ("thresholds", "biases", "gains")}
    assert config.learn == expected[preset]
    assert preset != "published" or config == SCAPConfig.from_spec("0.5")
