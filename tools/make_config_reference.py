#!/usr/bin/env python3
"""Writes docs/configuration.md from the configuration classes; with --check only compares."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path

from pmpo_megatron.algo.objective import PRESETS
from pmpo_megatron.config import Section, describe, field_types
from pmpo_megatron.training.run_config import RunConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

Every setting of a run. This page is made by `tools/make_config_reference.py` from the classes that the program reads its
configuration with; do not edit it. `pmpo-train --print-config` prints the same, and with `--config FILE` the values that a
run of that file would use.

A run is one YAML file with a section for each heading below. What is left out has its default; `required` has none.
Overrides on the command line have the form `section.key=value` and are read as YAML, `evaluation.data=null` for example.

- An unknown key, a key given twice, a value of another type or out of range, and settings that contradict each other are
  errors before anything starts; the message names the field, the value and what would be right.
- `objective.preset` is not a field but a base that the other keys of `objective` change: {presets}.
  See [objective.md](objective.md#settings).
"""


def section_type(expected: object) -> type[Section] | None:
    """The section that a field of type ``expected`` holds, also where it may be None."""
    candidates = (expected, *getattr(expected, "__args__", ()))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def bounds(item: dataclasses.Field) -> str:
    """The range of a field, as it is checked; empty where there is none."""
    signs = (("minimum", "≥"), ("above", ">"), ("maximum", "≤"))
    return ", ".join(f"{sign} {item.metadata[name]:g}" for name, sign in signs if item.metadata.get(name) is not None)


def in_yaml(text: str) -> str:
    """The text of a Python type or value as YAML has it."""
    text = re.sub(r"tuple\[(\w+), \.\.\.\]", r"list of \1", text)
    text = re.sub(r"dict\[\w+, dict\[\w+, Any\]\]", "mapping to mappings", text)
    text = re.sub(r"dict\[\w+, (\w+)\]", r"mapping to \1", text).replace(" | None", " or null")
    text = {"True": "true", "False": "false", "": "''"}.get(text, text)
    return f"[{text[1:-1]}]" if text.startswith("(") else text


def cell(text: str) -> str:
    """``text`` for a Markdown table; a bar would end the cell, also inside code."""
    return text.replace("``", "`").replace("|", "\\|").replace("<", "&lt;")


def table(section: type[Section], names: dict[type, str]) -> list[str]:
    """One row for each field; a section inside a section is one row that refers to where its fields are described."""
    rows = {name: row for name, *row in describe(section)}
    lines = ["| field | type | default | range | meaning |", "|---|---|---|---|---|"]
    for item in dataclasses.fields(section):
        inner = section_type(field_types(section)[item.name])
        if inner is None:
            kind, default, meaning = rows[item.name]
        else:
            kind, default, link = "section", "null" if item.default is None else "its defaults", names[inner]
            meaning = f"{item.metadata['help']}. Has the fields of [{link}](#{link.replace('.', '')})"
        columns = [f"`{item.name}`", in_yaml(kind), f"`{in_yaml(default)}`", bounds(item), meaning]
        lines.append(f"| {' | '.join(map(cell, columns))} |")
    return lines


def page() -> str:
    """The whole page."""
    sections = {name: section_type(kind) for name, kind in field_types(RunConfig).items()}
    for name, section in list(sections.items()):
        inner = {f"{name}.{key}": section_type(kind) for key, kind in field_types(section).items()}
        sections |= {key: kind for key, kind in inner.items() if kind is not None and kind not in sections.values()}
    names = {kind: name for name, kind in reversed(sections.items())}
    parts = [HEAD.format(presets=", ".join(f"`{name}`" for name in PRESETS))]
    for name, section in sections.items():
        parts.append("\n".join([f"## {name}", "", cell(section.__doc__), "", *table(section, names), ""]))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes docs/configuration.md from the configuration classes.")
    parser.add_argument("--check", action="store_true", help="exit code 1 if the page is not what the classes say")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"error: {PAGE} is not what the configuration classes say; run tools/make_config_reference.py")


if __name__ == "__main__":
    main()
