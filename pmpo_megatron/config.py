"""Typed, frozen configuration sections and how YAML and the command line fill them.

This file knows no section: each section's class stands beside the code that it configures, derives from `Section`,
and declares its fields with `setting`. `run_config.py` composes them into the configuration of a run.

    @dataclass(frozen=True, kw_only=True)
    class RolloutConfig(Section):
        \"\"\"How responses are sampled.\"\"\"
        temperature: float = setting(1.0, "sampling temperature", above=0.0)
        engine: str = setting("vllm", "which engine", choices=("vllm", "replay"))

        def validate(self) -> None:           # cross-field checks, optional
            ...raise ConfigError("temperature", "...")
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.yaml_values import apply_overrides, read_yaml, show

__all__ = [
    "Section",
    "apply_overrides",
    "build",
    "convert",
    "describe",
    "field_types",
    "import_named",
    "read_yaml",
    "setting",
    "to_plain",
]

SectionT = TypeVar("SectionT", bound="Section")
LARGEST_FLOAT = 1e30  # what is squared or multiplied stays within float32's and float64's range
LARGEST_INT = 2**63 - 1  # signed, 64 bits: what tensors, files and random generators hold
LARGEST = {"s": 1e6, "GiB": 1e6, "MiB": 1e6, "tokens": 2**40}  # by unit; poll() counts milliseconds in 32 bits
NO_CHARACTER = re.compile("[\0\ud800-\udfff]")


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    unit: str = "",
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """A field of a `Section`: its default, its meaning, its unit and its range.

    Args:
        default: the value when none is given; left out, the field is required. A mutable default is copied.
        help: one line for ``--print-config`` and the configuration reference.
        unit: unit of the value, e.g. ``tokens`` or ``s``.
        minimum, maximum: inclusive bounds; ``above``: exclusive lower bound. Without ``maximum`` the unit's (`LARGEST`)
            holds, and for every number that of its type.
        choices: the only values allowed.
    """
    maximum = LARGEST.get(unit) if maximum is None else maximum
    metadata = {"help": help, "unit": unit, "minimum": minimum, "above": above, "maximum": maximum, "choices": choices}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    if isinstance(default, type) and issubclass(default, Section):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of every configuration section: checks types and ranges of its fields, then calls `validate`."""

    def __post_init__(self) -> None:
        hints = field_types(type(self))
        for item in dataclasses.fields(self):
            value = convert(getattr(self, item.name), hints[item.name], item.name)
            object.__setattr__(self, item.name, value)
            _check_range(item, value)
        self.validate()

    def validate(self) -> None:
        """Cross-field checks of a subclass; raises `ConfigError` with the field's bare name."""

    @classmethod
    def base_for(cls: type[SectionT], values: dict[str, Any]) -> dict[str, Any]:
        """Defaults that depend on the given values, e.g. a preset. ``values`` may be edited (keys consumed)."""
        return {}


def import_named(field: str, name: str) -> Any:
    """What ``name``, ``package.module:Name``, stands for in a file of the user's own.

    Raises:
        ConfigError: it cannot be imported; names ``field``.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        raise ConfigError(field, f"{name!r} cannot be imported: {type(error).__name__}: {error}") from None


def field_types(section: type[Any]) -> dict[str, Any]:
    """Resolved type of every field of ``section``, by name."""
    return typing.get_type_hints(section)


def convert(value: Any, expected: Any, name: str) -> Any:
    """``value`` as ``expected``, without guessing: int -> float, list -> tuple and numeric strings such as 1e-6 only.

    Raises:
        ConfigError: ``value`` has another type, or no field can hold it (see `_check_value`); names the field, the value and
            what would be right.
    """
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return _check_value(value, name)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for option in (a for a in arguments if a is not type(None)):
            try:
                return convert(value, option, name)
            except ConfigError as error:
                last = error
        raise last
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(convert(v, arguments[0], f"{name}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        keys = [convert(key, arguments[0], f"{name}: key") for key in value]
        return {key: convert(v, arguments[1], f"{name}.{key}") for key, v in zip(keys, value.values(), strict=True)}
    if expected is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return _check_value(float(value), name)  # YAML reads 1e-6 as a string
        except ValueError:
            pass
        except OverflowError:
            raise ConfigError(name, f"{show(value)} is beyond {LARGEST_FLOAT:g}") from None
    elif isinstance(origin or expected, type) and isinstance(value, origin or expected):
        if not (isinstance(value, bool) and expected is int):
            return _check_value(value, name)
    wanted = getattr(expected, "__name__", str(expected))
    raise ConfigError(name, f"{show(value)} is a {type(value).__name__}; expected {wanted}")


def _check_value(value: Any, name: str) -> Any:
    """``value``, if any field may hold it, whatever its own range: finite, of 64 bits, text that can be used."""
    if isinstance(value, float):
        if math.isnan(value):
            raise ConfigError(name, "is not a number")
        if abs(value) > LARGEST_FLOAT:
            raise ConfigError(name, f"{value!r} is beyond {LARGEST_FLOAT:g}" if math.isfinite(value) else "is infinite")
    elif isinstance(value, int) and abs(value) > LARGEST_INT:
        raise ConfigError(name, f"{show(value)} needs more than 64 bits")
    elif isinstance(value, str):
        if not value:
            raise ConfigError(name, "is empty")
        if NO_CHARACTER.search(value):
            raise ConfigError(name, f"{show(value)} holds NUL or half of a surrogate pair, which are no text")
    return value


def _check_range(item: dataclasses.Field, value: Any) -> None:
    rules = item.metadata
    if value is None or not rules:
        return
    if rules.get("choices") is not None and value not in rules["choices"]:
        raise ConfigError(item.name, f"{show(value)} is not one of {', '.join(map(repr, rules['choices']))}")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    unit = f" {rules['unit']}" if rules.get("unit") else ""
    if rules.get("minimum") is not None and value < rules["minimum"]:
        raise ConfigError(item.name, f"{value!r} must be at least {rules['minimum']}{unit}")
    if rules.get("above") is not None and value <= rules["above"]:
        raise ConfigError(item.name, f"{value!r} must be above {rules['above']}{unit}")
    if rules.get("maximum") is not None and value > rules["maximum"]:
        raise ConfigError(item.name, f"{value!r} must be at most {rules['maximum']}{unit}")


def unknown_key(field: str, key: str, known: Sequence[str]) -> ConfigError:
    """The error for a key that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
    return ConfigError(field, f"unknown key {show(key)}{hint}")


def build(section: type[SectionT], values: Mapping[str, Any] | None) -> SectionT:
    """An instance of ``section`` from nested plain values (as read from YAML).

    Raises:
        ConfigError: an unknown key, a missing required field, or a bad value, with the dotted name of the field.
    """
    if isinstance(values, section):
        return values
    if values is not None and not isinstance(values, Mapping):
        raise ConfigError("", f"{show(values)} is not a mapping of the fields of {section.__name__}")
    given = dict(values or {})
    for key in given:
        if not isinstance(key, str):
            raise ConfigError("", f"the key {show(key)} is a {type(key).__name__}, not text")
    fields = {item.name: item for item in dataclasses.fields(section)}
    hints = field_types(section)
    arguments = _base(section, given, fields)
    for key, value in given.items():
        if key not in fields:
            raise unknown_key("", key, list(fields)).within(show(key)[1:-1])
        kind = _section_type(hints[key])
        if kind is not None and not (value is None and _optional(hints[key])):
            try:
                value = build(kind, value)
            except ConfigError as error:
                raise error.within(key) from None
        arguments[key] = value
    for name, item in fields.items():
        if name not in arguments and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            if kind := _section_type(hints[name]):  # a required section has a required field, which says more
                try:
                    build(kind, {})
                except ConfigError as error:
                    raise error.within(name) from None
            raise ConfigError(name, f"is required ({item.metadata.get('help', '')})")
    return section(**arguments)


def _base(section: type[Section], given: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """`Section.base_for`, which may edit ``given``; what it takes beside fields, such as a preset, is a name."""
    names = {key: value for key, value in given.items() if key not in fields and not isinstance(value, str)}
    try:
        return section.base_for(given)
    except (TypeError, ValueError):
        for key, value in names.items():
            raise ConfigError(key, f"{show(value)} is a {type(value).__name__}; expected a name") from None
        raise


def _section_type(expected: Any) -> type[Section] | None:
    for option in (expected, *typing.get_args(expected)):
        if isinstance(option, type) and issubclass(option, Section):
            return option
    return None


def _optional(expected: Any) -> bool:
    return type(None) in typing.get_args(expected)


def to_plain(section: Section) -> dict[str, Any]:
    """Nested plain values of ``section``: what `build` accepts and YAML can write."""

    def plain(value: Any) -> Any:
        if isinstance(value, Section):
            return to_plain(value)
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        return value

    return {item.name: plain(getattr(section, item.name)) for item in dataclasses.fields(section)}


def describe(section: type[Section], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Rows (dotted name, type, default, meaning) for every field of ``section`` and of the sections inside it."""
    rows = []
    hints = field_types(section)
    for item in dataclasses.fields(section):
        name = f"{prefix}{item.name}"
        inner = _section_type(hints[item.name])
        if inner is not None:
            rows.extend(describe(inner, f"{name}."))
            continue
        if item.default is not dataclasses.MISSING:
            default = "null" if item.default is None else str(item.default)
        elif item.default_factory is not dataclasses.MISSING:
            default = str(item.default_factory())
        else:
            default = "required"
        kind = hints[item.name]
        kind = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")
        meaning = item.metadata.get("help", "")
        if item.metadata.get("choices"):
            meaning += f" ({' | '.join(map(str, item.metadata['choices']))})"
        if item.metadata.get("unit"):
            meaning += f" [{item.metadata['unit']}]"
        rows.append((name, kind, default, meaning))
    return rows
