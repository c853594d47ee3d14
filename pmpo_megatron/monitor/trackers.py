"""Where else metrics go: TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.monitor.config import MonitorConfig


class Tracker(Protocol):
    """Somewhere that metrics are sent."""

    def log(self, step: int, numbers: Mapping[str, float], distributions: Mapping[str, np.ndarray]) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Event files. After a resume, events of steps that are run again are hidden."""

    def __init__(self, directory: Path, run: Mapping[str, Any], *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=first_step or None, flush_secs=10)
        if not first_step:
            self._writer.add_text("config", f"```json\n{json.dumps(run, indent=1, default=str)}\n```")

    def log(self, step: int, numbers: Mapping[str, float], distributions: Mapping[str, np.ndarray]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        for name, values in distributions.items():
            if np.isfinite(values).all():
                self._writer.add_histogram(name.rstrip("/"), values, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run, continued after a resume."""

    def __init__(self, project: str, directory: Path, run: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "monitor.wandb_project",
                f"{project!r} needs the package wandb, which is not installed: `pip install wandb`, or leave it null",
            ) from None
        identity = directory / "wandb_run_id"
        name = identity.read_text().strip() if identity.exists() else uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=project, dir=str(directory), config=dict(run), name=directory.name, id=name, resume="allow"
        )
        identity.write_text(f"{name}\n")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: Mapping[str, float], distributions: Mapping[str, np.ndarray]) -> None:
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        self._run.finish()


def make_trackers(config: MonitorConfig, directory: Path, run: Mapping[str, Any], *, first_step: int) -> list[Tracker]:
    """The trackers that ``config`` asks for.

    Args:
        run: plain values that describe the run, shown beside its metrics.
        first_step: the first step that is still to come; later ones in existing logs are superseded.

    Raises:
        ConfigError: a tracker's package is missing.
    """
    trackers: list[Tracker] = []
    if config.wandb_project is not None:
        trackers.append(WandbTracker(config.wandb_project, directory, run))
    if config.tensorboard:
        trackers.append(TensorBoardTracker(directory / "tensorboard", run, first_step=first_step))
    return trackers
