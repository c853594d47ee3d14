"""A run's record, read back for plots."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pmpo_megatron.errors import DataError
from pmpo_megatron.monitor.jsonl import read_json_lines


@dataclass(frozen=True)
class RunRecord:
    """What `RunLog` wrote. ``metrics`` has one entry for each step, in order: lines of one step are merged."""

    label: str
    directory: Path
    description: dict[str, Any]  # run.json; empty where it is absent
    metrics: tuple[dict[str, Any], ...]
    trajectories: tuple[dict[str, Any], ...]
    rollouts: tuple[dict[str, Any], ...]
    tokens: tuple[dict[str, Any], ...]
    experts: tuple[dict[str, Any], ...]

    @property
    def step_name(self) -> str:
        return self.description.get("step_name", "step")

    @property
    def config(self) -> dict[str, Any]:
        return flatten(self.description.get("config", {}))

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the metric ``name``, where it was measured."""
        points = [(record["step"], float(record[name])) for record in self.metrics if name in record]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)

    def names(self, prefix: str, suffix: str = "") -> list[str]:
        """Metrics that begin with ``prefix`` and end with ``suffix``, in the order of their first appearance."""
        names = dict.fromkeys(name for record in self.metrics for name in record)
        return [name for name in names if name.startswith(prefix) and name.endswith(suffix)]


def read_run(directory: str | Path, *, label: str | None = None) -> RunRecord:
    """The record in ``directory``.

    Raises:
        DataError: the directory is absent, is no run, or its record is damaged; says what was looked for.
    """
    directory = Path(directory)
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise DataError(_no_run(directory))
    description = {}
    if (directory / "run.json").is_file():
        try:
            description = json.loads((directory / "run.json").read_text())
        except ValueError as error:
            raise DataError(f"{directory / 'run.json'}: not JSON: {error}") from None
    steps: dict[int, dict[str, Any]] = {}
    for number, record in enumerate(read_json_lines(path), 1):
        if not isinstance(record.get("step"), int):
            raise DataError(f"{path}:{number}: has no whole number 'step'")
        steps.setdefault(record["step"], {}).update(record)
    if not steps:
        raise DataError(f"{path} is empty: the run has not finished a step yet")
    optional = {name: directory / f"{name}.jsonl" for name in ("trajectories", "rollouts", "tokens", "experts")}
    return RunRecord(
        label=label or description.get("title") or directory.resolve().name,
        directory=directory,
        description=description,
        metrics=tuple(steps[step] for step in sorted(steps)),
        **{name: tuple(read_json_lines(file)) if file.is_file() else () for name, file in optional.items()},
    )


def read_runs(directories: list[Path]) -> list[RunRecord]:
    """The records of several runs, with labels that tell them apart."""
    runs = [read_run(directory) for directory in directories]
    labels = [run.label for run in runs]
    if len(set(labels)) == len(labels):
        return runs
    parts = [directory.resolve().parts for directory in directories]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return [read_run(d, label="/".join(p[shared:])) for d, p in zip(directories, parts, strict=True)]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def _no_run(directory: Path) -> str:
    if not directory.exists():
        return f"{directory} does not exist"
    if not directory.is_dir():
        return f"{directory} is a file; give the run's directory, which holds metrics.jsonl"
    inside = sorted(str(path.parent) for path in directory.glob("*/metrics.jsonl"))
    hint = f"; did you mean {', '.join(inside[:4])}?" if inside else "; give the directory that run.directory names"
    return f"{directory} is not a run: it has no metrics.jsonl{hint}"
