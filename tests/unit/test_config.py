"""Configuration machinery: strict keys, types, ranges, overrides, and errors that say what would be right."""

import dataclasses
import datetime
import math
from dataclasses import dataclass

import pytest

from pmpo_megatron.config import Section, apply_overrides, build, describe, read_yaml, setting, to_plain
from pmpo_megatron.data.prompts import DataConfig
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.training.run_config import RunConfig


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


def test_off_is_a_word_for_the_settings_that_have_it():
    values = apply_overrides({}, ["bridge.verify=off", "round.dynamic_sampling=true"])
    assert values == {"bridge": {"verify": "off"}, "round": {"dynamic_sampling": True}}


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


HOSTILE_YAML = {
    "not UTF-8": b"run: {directory: \xff}\n",
    "an alias of what it is part of": b"run: &r {directory: [*r]}\n",
    "aliases of aliases": b"a: &a [1,1,1,1,1,1,1,1,1]\n"
    + b"".join(b"%c: &%c [%s]\n" % (c + 1, c + 1, b",".join([b"*%c" % c] * 9)) for c in range(97, 107)),
    "nested": b"run: " + b"[" * 10_000 + b"]" * 10_000,
    "a list as a key": b"? [a]\n: 1\n",
    "a number of 10,000 digits": b"run: {seed: " + b"9" * 10_000 + b"}\n",
    "no date": b"run: {seed: 2001-13-45}\n",
    "control characters": b"run: \x00\n",
    "a duplicate in a flow mapping": b"run: {seed: 1, seed: 2}\n",
}


@pytest.mark.parametrize("text", HOSTILE_YAML.values(), ids=HOSTILE_YAML)
def test_odd_yaml_is_one_line_that_names_the_file(tmp_path, text):
    (tmp_path / "c.yaml").write_bytes(text)
    with pytest.raises(ConfigError, match="c.yaml: is not (valid YAML|UTF-8)") as caught:
        read_yaml(tmp_path / "c.yaml")
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500


@pytest.mark.parametrize("text", ["{engine: vllm, engine: replay}", "[" * 10_000, "&a [*a]", "9" * 10_000, '"\\ud800', "? [a]"])
def test_odd_overrides_are_one_line_that_names_the_field(text):
    with pytest.raises(ConfigError, match="^rollout: .* is not valid YAML") as caught:
        apply_overrides({}, [f"rollout={text}"])
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 700


def test_keys_are_text():
    for values in ({3: "x"}, {"path": "x", "rollout": {None: 3}}):
        with pytest.raises(ConfigError, match="the key (3|None) is a .*, not text"):
            build(Outer, values)


def deep_list() -> list:
    value: list = []
    for _ in range(10_000):
        value = [value]
    return value


HOSTILE = {
    "inf": math.inf,
    "-inf": -math.inf,
    "nan": math.nan,
    ".inf as text": "inf",
    "10**30": 10**30,
    "10**400": 10**400,
    "0x1...": 1 << 50_000,
    "1e300": 1e300,
    "2**63": 2**63,
    "-2**63": -(2**63),
    "text": "x",
    "empty text": "",
    "NUL": "a\0b",
    "surrogate": "\udcff",
    "empty list": [],
    "empty mapping": {},
    "deep": deep_list(),
    "a mapping of lists": {"a": [1]},
    "mapping to inf": {"math": math.inf},
    "mapping to nan": {"math": math.nan},
    "a number as key": {1: 1.0},
    "list of inf": [math.inf],
    "list of 10**30": [10**30],
    "list of empty text": [""],
    "true": True,
    "null": None,
    "date": datetime.date(2026, 1, 1),
    "bytes": b"x",
    "set": {1},
}
FIELDS = [row[0] for row in describe(RunConfig)] + [f"evaluation.data.{row[0]}" for row in describe(DataConfig)]
FIELDS += ["objective.preset", *(item.name for item in dataclasses.fields(RunConfig))]


def leaves(value):
    if isinstance(value, (dict, list, tuple)):
        for each in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from leaves(each)
    else:
        yield value


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_takes_what_no_run_can_use(name):
    """Exactly one line that names the field, or a value that a run can use."""
    kinds = {row[0]: row[1] for row in describe(RunConfig)}
    for what, hostile in HOSTILE.items():
        values = {"model": {"path": "m"}, "data": {"source": "arithmetic"}}
        *sections, key = name.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {"source": "arithmetic"} if section == "data" else {})
        target[key] = hostile
        try:
            config = build(RunConfig, values)
        except ConfigError as error:
            text = str(error)
            assert text.startswith(name.split(".")[0]) and len(text.splitlines()) == 1 and len(text) < 700, (what, text)
            continue
        for leaf in leaves(to_plain(config)):
            if isinstance(leaf, (int, float)):
                assert math.isfinite(leaf) and abs(leaf) < (2**63 if isinstance(leaf, int) else 1e31), (what, leaf)
            assert not isinstance(leaf, str) or (leaf and "\0" not in leaf), what
        if what == "true" and name in kinds:
            assert kinds[name] == "bool", "true is no number"


@pytest.mark.parametrize(
    "override, message",
    [
        ("optimizer.learning_rate=inf", "optimizer.learning_rate: is infinite"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: is infinite"),
        ("objective.kl_coefficient=inf", "objective.kl_coefficient: is infinite"),
        ("rollout.kv_cache_gib=inf", "rollout.kv_cache_gib: is infinite"),
        ("parallel.timeout_s=1e10", "parallel.timeout_s: 10000000000.0 must be at most 1000000.0 s"),
        ("rewards.functions={math: .nan}", "rewards.functions.math: is not a number"),
        (f"run.seed={2**64}", "run.seed: 18446744073709551616 needs more than 64 bits"),
        ("run.directory=", "run.directory: is empty"),
        ("data.problems=100000000", "data.problems: 100000000 must be at most 1000000"),
        ("data.answer_after=''", "data.answer_after: is empty"),
        ("sampling.temperature=1e-4", "sampling.temperature: 0.0001 must be 0, which is greedy, or at least 0.01"),
        ("optimizer.beta2=1", "optimizer.beta2: 1.0 must be at most 0.999999"),
    ],
)
def test_absurd_values_are_named(override, message):
    with pytest.raises(ConfigError) as caught:
        build(RunConfig, apply_overrides({"model": {"path": "m"}, "data": {"source": "arithmetic"}}, [override]))
    assert str(caught.value) == message
