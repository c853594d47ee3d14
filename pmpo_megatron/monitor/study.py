"""A study: variants of one configuration, each run with the same seeds and budget, and their raw results in one CSV file.

The file has one row for every round of every finished run, so that a later machine goes on from it without the runs'
directories. It says by which settings each row came about; rows of other settings are an error, never mixed.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pmpo_megatron.checkpoint.files import replace_text
from pmpo_megatron.config import Section, build, read_yaml, setting
from pmpo_megatron.errors import ConfigError, DataError
from pmpo_megatron.monitor.read import RunRecord
from pmpo_megatron.yaml_values import apply_overrides

GREEDY, SAMPLED, REWARD = "eval/greedy_accuracy_mean", "eval/accuracy_mean", "reward/mean"
OBJECTIVE = tuple(f"objective/{name}" for name in ("p_mean", "p_q05", "p_q50", "p_q95", "ess_fraction", "ess_target"))
METRICS = (
    REWARD,
    SAMPLED,
    GREEDY,
    *OBJECTIVE,
    "objective/clip_fraction",
    "policy/grad_norm",
    "policy/entropy",
    "policy/skipped_steps",
    "rollout/length_mean",
    "rollout/staleness",
    "mismatch/mean_abs",
    "time/total_s",
)
OF_SOURCES = (GREEDY, SAMPLED, REWARD, *OBJECTIVE[:2], "objective/ess_fraction", "objective/clip_fraction")
UPDATES = "updates/grad_norm"  # one number for each optimizer step; a cell of the file holds those of a round
WINDOW = 3  # rounds, of the means by which collapse is told
COLLAPSE = (
    f"A run has collapsed if its mean training reward over the last {WINDOW} rounds is below half of its own best mean over "
    f"{WINDOW} rounds in a row, or if it ended because of numbers that are not finite."
)
ANY = "*"


@dataclass(frozen=True, kw_only=True)
class StudyConfig(Section):
    """What is varied. A variant takes one level of every axis; a level is a list of overrides of the configuration."""

    title: str = setting(help="heading of the report")
    config: str = setting(help="configuration file that all runs share, from the project's root")
    settings: tuple[str, ...] = setting((), "overrides for all runs, section.key=value")
    rounds: int = setting(help="rounds of each run", minimum=1)
    seeds: int = setting(3, "seeds of each variant, from 1 on", minimum=1)
    axes: dict[str, Any] = setting(help="axis -> level -> list of overrides")
    reference: tuple[str, ...] = setting(help=f"a level of every axis: what others are compared with; {ANY}: their own level")
    heat_map: tuple[str, ...] = setting((), "two axes, rows and columns; one map for each combination of the others")
    sources: tuple[str, ...] = setting((), "sources of the data that are compared one by one, too")

    def validate(self) -> None:
        for axis, levels in self.axes.items():
            if not isinstance(levels, dict) or not levels:
                raise ConfigError("axes", f"{axis}: must map levels to lists of overrides")
            for level, overrides in levels.items():
                if not re.fullmatch(r"[\w.=+-]+", str(level)):
                    raise ConfigError("axes", f"{axis}: the level {level!r} names a directory: letters, digits and .=+-_ alone")
                if not isinstance(overrides, list) or not all(isinstance(item, str) for item in overrides):
                    raise ConfigError("axes", f"{axis}: {level}: must be a list of overrides, section.key=value")
        known = [(ANY, *map(str, levels)) for levels in self.axes.values()]
        if len(self.reference) != len(known) or any(r not in levels for r, levels in zip(self.reference, known, strict=False)):
            raise ConfigError(
                "reference", f"{list(self.reference)}: must name a level (or {ANY}) of each of {', '.join(self.axes)}"
            )
        if self.heat_map and (len(self.heat_map) != 2 or not set(self.heat_map) <= set(self.axes)):
            raise ConfigError("heat_map", f"{list(self.heat_map)}: must be two of {', '.join(self.axes)}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is kept of every round: one number each."""
        return (*METRICS, *(of_source(metric, source) for source in self.sources for metric in OF_SOURCES))

    def variants(self) -> dict[tuple[str, ...], list[str]]:
        """Levels, one of each axis, and the overrides that they stand for."""
        choices = [[(str(level), overrides) for level, overrides in axis.items()] for axis in self.axes.values()]
        return {
            tuple(level for level, _ in combination): [item for _, overrides in combination for item in overrides]
            for combination in itertools.product(*choices)
        }

    def reference_of(self, levels: Sequence[str]) -> tuple[str, ...]:
        """What the variant ``levels`` is compared with."""
        return tuple(own if wanted == ANY else wanted for own, wanted in zip(levels, self.reference, strict=True))

    def key(self, overrides: Sequence[str], configuration: dict[str, Any]) -> str:
        """By which a row says what it was measured with: changes with every setting that holds, and with the budget."""
        settings = apply_overrides(configuration, [*self.settings, *overrides])
        text = json.dumps([settings, self.rounds], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


def of_source(metric: str, source: str) -> str:
    """The name of ``metric`` where it is measured on one source alone (see `training.sources` and `training.held_out`)."""
    section, _, name = metric.partition("/")
    prefix = {"eval": f"eval/{source}/", "reward": f"source/{source}/reward_", "objective": f"source/{source}/"}[section]
    return f"{prefix}{name}"


def read_study(path: Path, *, rounds: int | None = None, seeds: int | None = None) -> StudyConfig:
    """The study in the file ``path``, with other numbers of rounds and seeds where given.

    Raises:
        ConfigError: the file is absent or something in it is wrong; names it.
    """
    given = {name: value for name, value in (("rounds", rounds), ("seeds", seeds)) if value is not None}
    try:
        return build(StudyConfig, read_yaml(path) | given)
    except ConfigError as error:
        raise error.within(path.name) from None


@dataclass(frozen=True)
class Variant:
    """One combination of levels and its finished runs: by seed, by metric, by round (`UPDATES`: by optimizer step)."""

    levels: tuple[str, ...]
    runs: dict[int, dict[str, dict[int, float]]]

    @property
    def name(self) -> str:
        return "/".join(self.levels)

    def curves(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """(rounds [R], values [runs, R]) at the rounds that all runs have; empty where a run lacks the metric."""
        series = [run.get(metric, {}) for run in self.runs.values()]
        rounds = sorted(set.intersection(*map(set, series))) if series else []
        return np.array(rounds), np.array([[points[number] for number in rounds] for points in series])

    def by_seed(self, metric: str, reduce: str) -> dict[int, float]:
        """One number for each seed that has ``metric``: ``first``, ``last``, ``mean``, ``max`` or ``q99``, a percentile."""
        series = {
            seed: [run[metric][number] for number in sorted(run[metric])] for seed, run in self.runs.items() if metric in run
        }
        reductions: dict[str, Callable[[list[float]], Any]] = {
            "first": lambda v: v[0],
            "last": lambda v: v[-1],
            "mean": np.mean,
            "max": np.max,
        }
        reductions["q99"] = lambda values: np.quantile(values, 0.99)
        return {seed: float(reductions[reduce](values)) for seed, values in series.items()}

    def collapsed(self) -> dict[int, bool]:
        """By seed, whether the run collapsed: see `COLLAPSE`."""
        return {seed: has_collapsed([run[REWARD][n] for n in sorted(run[REWARD])]) for seed, run in self.runs.items()}


def has_collapsed(rewards: Sequence[float]) -> bool:
    """Whether the mean rewards of a run's rounds are those of a collapsed run: see `COLLAPSE`."""
    if not np.isfinite(rewards).all():
        return True
    width = min(WINDOW, len(rewards))
    means = np.convolve(rewards, np.full(width, 1 / width), mode="valid")
    return bool(means[-1] < means.max() / 2)


class Results:
    """The raw results of a study in a CSV file; rows are added a whole run at a time, in one step.

    Raises:
        DataError: the file is damaged, or belongs to a study with other axes.
    """

    def __init__(self, path: Path, study: StudyConfig) -> None:
        self.path, self.axes, self.metrics = path, list(study.axes), study.metrics
        self.columns = [*self.axes, "seed", "settings", "round", *self.metrics, UPDATES]
        self.rows: list[dict[str, str]] = []
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                if reader.fieldnames != self.columns:
                    raise DataError(f"{path}: its columns are not {', '.join(self.columns)}; is it of another study?")
                self.rows = list(reader)

    def find(self, levels: Sequence[str], seed: int, key: str) -> bool:
        """Whether this run is in the file.

        Raises:
            DataError: it is, but measured with other settings or another number of rounds.
        """
        mine = [row for row in self.rows if self._levels(row) == tuple(levels) and row["seed"] == str(seed)]
        if mine and {row["settings"] for row in mine} != {key}:
            raise DataError(
                f"{self.path}: {'/'.join(levels)}, seed {seed}, was measured with other settings or rounds; "
                "name another --out, or take its rows out"
            )
        return bool(mine)

    def add(self, levels: Sequence[str], seed: int, key: str, run: RunRecord) -> None:
        """Adds the finished ``run`` and replaces the file in one step."""
        shared = dict(zip(self.axes, levels, strict=True)) | {"seed": str(seed), "settings": key}
        for record in run.metrics:
            values = {name: f"{float(record[name]):.6g}" for name in self.metrics if name in record}
            updates = " ".join(f"{value:.6g}" for value in record.get(UPDATES, ()))
            self.rows.append(shared | {"round": str(record["step"]), UPDATES: updates} | values)
        lines = (",".join(row.get(name, "") for name in self.columns) for row in self.rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, "\n".join([",".join(self.columns), *lines]) + "\n")

    def variants(self) -> list[Variant]:
        """All that have a finished run, in the order of the file.

        Raises:
            DataError: a value is no number; names it.
        """
        found: dict[tuple[str, ...], dict[int, dict[str, dict[int, float]]]] = {}
        for number, row in enumerate(self.rows, 2):
            try:
                run = found.setdefault(self._levels(row), {}).setdefault(int(row["seed"]), {})
                for name in filter(row.get, self.metrics):
                    run.setdefault(name, {})[int(row["round"])] = float(row[name])
                for norm in row[UPDATES].split():
                    norms = run.setdefault(UPDATES, {})
                    norms[len(norms)] = float(norm)
            except (TypeError, ValueError) as error:
                raise DataError(f"{self.path}:{number}: {error}") from None
        return [Variant(levels, runs) for levels, runs in found.items()]

    def _levels(self, row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[axis] for axis in self.axes)


def pick(names: Iterable[tuple[str, ...]], only: Sequence[str]) -> list[tuple[str, ...]]:
    """The variants that ``only`` names, all for none; each of ``only`` is a level, or levels joined by a slash.

    Raises:
        ConfigError: one of them names nothing.
    """
    names = list(names)
    for wanted in only:
        if not any(set(wanted.split("/")) <= set(levels) for levels in names):
            raise ConfigError("--only", f"{wanted!r} is no level; the variants are {', '.join('/'.join(n) for n in names)}")
    return [levels for levels in names if not only or any(set(wanted.split("/")) <= set(levels) for wanted in only)]
