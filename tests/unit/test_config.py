"""Configuration machinery: strict keys, types, ranges, overrides, and errors that say what would be right."""

from dataclasses import dataclass

import pytest

from pmpo_megatron.config import Section, apply_overrides, build, describe, read_yaml, setting, to_plain
from pmpo_megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner(Section):
    temperature: float = setting(1.0, "sampling temperature", above=0.0)
    engine: str = setting("vllm", "engine", choices=("vllm", "replay"))
    stop: tuple[str, ...] = setting((), "stop strings")
    limit: int | None = setting(None, "limit", unit="tokens", minimum=1)


@dataclass(frozen=True, kw_only=True)
class Outer(Section):
    rollout: Inner = setting(Inner, "rollouts")
    seed: int = setting(0, "seed")
    path: str = setting(help="where")

    def validate(self):
        if self.seed == 13:
            raise ConfigError("seed", "13 is unlucky; use 14")


def test_values_and_defaults_round_trip():
    outer = build(Outer, {"path": "x", "rollout": {"temperature": 2, "stop": ["a"], "limit": 3}})
    assert outer.rollout == Inner(temperature=2.0, stop=("a",), limit=3)
    assert isinstance(outer.rollout.temperature, float)
    assert build(Outer, to_plain(outer)) == outer


@pytest.mark.parametrize(
    "values, message",
    [
        ({"path": "x", "rolout": {}}, "rolout: unknown key 'rolout'; did you mean 'rollout'?"),
        (
            {"path": "x", "rollout": {"temprature": 1}},
            "rollout.temprature: unknown key 'temprature'; did you mean 'temperature'?",
        ),
        ({"path": "x", "rollout": {"temperature": 0}}, "rollout.temperature: 0.0 must be above 0.0"),
        ({"path": "x", "rollout": {"temperature": "hot"}}, "rollout.temperature: 'hot' is a str; expected float"),
        ({"path": "x", "rollout": {"engine": "sglang"}}, "rollout.engine: 'sglang' is not one of 'vllm', 'replay'"),
        ({"path": "x", "rollout": {"limit": 0}}, "rollout.limit: 0 must be at least 1 tokens"),
        ({"path": "x", "rollout": {"stop": [3]}}, "rollout.stop[0]: 3 is a int; expected str"),
        ({"path": "x", "seed": True}, "seed: True is a bool; expected int"),
        ({"path": "x", "seed": 13}, "seed: 13 is unlucky; use 14"),
        ({"path": "x", "rollout": 3}, "rollout: 3 is not a mapping of the fields of Inner"),
        ({}, "path: is required (where)"),
    ],
)
def test_a_bad_value_names_field_value_and_remedy(values, message):
    with pytest.raises(ConfigError) as caught:
        build(Outer, values)
    assert str(caught.value) == message


def test_overrides_are_yaml_and_leave_the_input_alone():
    values = {"path": "x", "rollout": {"temperature": 1.0}}
    result = apply_overrides(values, ["rollout.temperature=1e-1", "rollout.stop=[a, b]", "seed=3", "rollout.limit=null"])
    assert build(Outer, result) == Outer(path="x", seed=3, rollout=Inner(temperature=0.1, stop=("a", "b")))
    assert values == {"path": "x", "rollout": {"temperature": 1.0}}
    for bad in ("seed", "=3", "path.x=3"):
        with pytest.raises(ConfigError):
            apply_overrides(values, [bad])


def test_yaml_errors_name_file_and_line(tmp_path):
    for text in ("a: 1\nb: 2\na: 3\n", "a: [1\n", "- 1\n"):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match="c.yaml"):
            read_yaml(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("a: 1\nb: 2\na: 3\n")
    with pytest.raises(ConfigError, match="duplicate key 'a'(.|\n)*line 3"):
        read_yaml(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "absent.yaml")


def test_describe_lists_every_field_once():
    rows = {row[0]: row for row in describe(Outer)}
    assert list(rows) == ["rollout.temperature", "rollout.engine", "rollout.stop", "rollout.limit", "seed", "path"]
    assert rows["rollout.limit"][2:] == ("null", "limit [tokens]") and rows["path"][2] == "required"
    assert "vllm | replay" in rows["rollout.engine"][3]
