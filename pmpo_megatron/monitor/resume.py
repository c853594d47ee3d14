"""A record that a run goes on with: cut to the checkpoint, what is missing in it, and which settings are others now."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

from pmpo_megatron.monitor.jsonl import JsonLines
from pmpo_megatron.monitor.read import flatten

NOT_SET = object()


def cut_back(files: Mapping[str, JsonLines], cursor: Mapping[str, Any], *, step_name: str) -> str | None:
    """Leaves in ``files`` the records up to ``cursor``; returns what is missing there, or None.

    A file with lines that are no records is copied to ``NAME.damaged`` before these lines are taken out.
    """
    step, problems = int(cursor["step"]), []
    for name, file in files.items():
        expected = int(cursor["bytes"].get(name, 0))
        lost = max(expected - file.size, 0)
        file.rewind(expected)
        lines = file.path.read_bytes().splitlines(keepends=True)
        steps = [_step(line) for line in lines]
        if garbled := steps.count(None):
            shutil.copyfile(file.path, file.path.with_name(f"{file.path.name}.damaged"))
        if garbled or any(number is not None and number > step for number in steps):
            file.replace(line for line, number in zip(lines, steps, strict=True) if number is not None and number <= step)
        if lost or garbled:
            missing = in_words(set(range(1, step + 1)).difference(steps))
            which = f"{step_name}s {missing} are missing" if missing else f"no {step_name} is missing altogether"
            problems.append(f"{file.path.name} ({lost} bytes gone, {garbled} lines garbled; {which})")
    return ", ".join(problems) or None


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``name: old -> new`` for every setting that differs; both nested, as JSON has them."""
    before, now = flatten(dict(old)), flatten(json.loads(json.dumps(new, default=str)))
    names = dict.fromkeys([*before, *now])
    pairs = ((name, before.get(name, NOT_SET), now.get(name, NOT_SET)) for name in names)
    return [f"{name}: {_value(was)} -> {_value(is_now)}" for name, was, is_now in pairs if was != is_now]


def in_words(numbers: Iterable[int]) -> str:
    """``1, 3 to 5``."""
    groups: list[list[int]] = []
    for number in sorted(numbers):
        if groups and groups[-1][-1] == number - 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(str(group[0]) if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in groups)


def _step(line: bytes) -> int | None:
    """The step of a record; None if ``line`` is no record."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int else None


def _value(value: Any) -> str:
    return "not set" if value is NOT_SET else json.dumps(value)
