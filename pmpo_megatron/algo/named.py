"""Classes that a setting names: those of this package by a word, the reader's own by ``package.module:Name``.

So are rules for p, clips and advantages named; docs/adding_a_rule.md shows one of each in a file outside the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pmpo_megatron.config import Section, build, import_named, unknown_key
from pmpo_megatron.errors import ConfigError

SectionT = TypeVar("SectionT", bound=Section)


def find_class(field: str, name: str, known: Mapping[str, type[SectionT]], base: type[SectionT]) -> type[SectionT]:
    """The class of ``known`` that ``name`` is for, or the subclass of ``base`` that ``package.module:Name`` imports.

    Raises:
        ConfigError: there is no such class; names ``field``.
    """
    if name in known:
        return known[name]
    if ":" not in name:
        raise unknown_key(field, name, [*known, "package.module:Name"])
    kind = import_named(field, name)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ConfigError(field, f"{name!r} is not a subclass of {base.__module__}.{base.__name__}")
    return kind


def make_instance(
    field: str, name: str, parameters: Mapping[str, Any], known: Mapping[str, type[SectionT]], base: type[SectionT]
) -> SectionT:
    """An instance of what `find_class` finds.

    Raises:
        ConfigError: also where a parameter is unknown, missing or out of range; names ``field`` + ``_parameters`` and it.
    """
    try:
        return build(find_class(field, name, known, base), parameters)
    except ConfigError as error:
        raise (error if error.field == field else error.within(f"{field}_parameters")) from None
