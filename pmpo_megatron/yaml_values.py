"""Plain values from YAML files and from overrides on the command line; whatever is odd about them becomes a `ConfigError`."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pmpo_megatron.errors import ConfigError

MAX_DEPTH = 20  # no section or value is nested half as deep
MAX_VALUES = 100_000  # with every alias written out


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in ``path``. Duplicate keys are errors, because YAML would silently keep the last.

    Raises:
        ConfigError: the file is absent, is not YAML, or is not a mapping; the message has file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(str(path), f"is not UTF-8 text: {error}") from None
    try:
        values = _load(text)
    except ValueError as error:
        raise ConfigError(str(path), f"is not valid YAML: {error}") from None
    if not isinstance(values, dict | None):
        raise ConfigError(str(path), "must hold a mapping of sections")
    return values or {}


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """``values`` with every ``section.key=value`` of ``overrides`` put in; the value is read as YAML.

    Raises:
        ConfigError: an override without ``=``, or a path that runs through something that is not a section.
    """
    result = _copy(values)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(override, "an override has the form section.key=value")
        *parents, key = path.split(".")
        target = result
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(path, f"{parent!r} is a value, not a section")
        try:
            target[key] = _load(text) if text else ""
        except ValueError as error:
            raise ConfigError(path, f"{show(text)} is not valid YAML: {error}") from None
    return result


def show(value: Any) -> str:
    """``value`` for a message: one line, cut where it is long, whatever it holds."""
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 200

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() < 200 else f"a number of {value.bit_length()} bits"  # repr has a limit


_SHORT = _Short()


class _UniqueKeyLoader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses a mapping with the same key twice. ``on`` and ``off`` are words, as since YAML 1.2."""

    resolvers = yaml.SafeLoader.yaml_implicit_resolvers.items()
    yaml_implicit_resolvers = {first: rules for first, rules in resolvers if first not in ("o", "O")}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _load(text: str) -> Any:
    """The value that ``text`` is in YAML; raises ValueError with a line that says what is wrong."""
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    except Exception as error:  # beside YAMLError: what int(), datetime and unhashable keys raise inside the library
        raise ValueError(" ".join(str(error).split())) from None
    _check_size(values)
    return values


def _check_size(values: Any) -> None:
    """Raises ValueError where ``values`` go on for ever, or nearly: an alias may stand for what it is part of."""
    waiting, count = [(values, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep, or holds more than {MAX_VALUES:,} values")
        if isinstance(value, dict):
            waiting += [(each, depth + 1) for pair in value.items() for each in pair]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(each, depth + 1) for each in value]


def _copy(values: Any) -> Any:
    return {k: _copy(v) for k, v in values.items()} if isinstance(values, dict) else values
