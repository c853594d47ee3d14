"""Starts real training runs and reads what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
SMALL = [
    "run.rounds=4",
    "data.source=arithmetic",
    "data.max_prompt_tokens=16",
    "data.problems=40",
    "sampling.samples_per_prompt=4",
    "sampling.max_tokens=12",
    "batch.prompts_per_round=6",
    "batch.steps_per_round=2",
    "batch.max_tokens_per_micro_batch=128",
    "optimizer.learning_rate=0.003",
    "rollout.kv_cache_gib=0.1",
    "rollout.threads=1",
    "rewards.functions={tests.integration.rewards:letters: 1.0}",
    "rewards.workers=1",
    "checkpoint.every_rounds=1",
    "evaluation.data={source: arithmetic, split: test, problems: 8, max_prompt_tokens: 16}",
    "evaluation.every_rounds=2",
    "monitor.progress=line",
    "monitor.token_examples=24",  # as many as an optimizer step has, at most
]


def command(model: str, directory: Path, *settings: str, processes: int = 1) -> list[str]:
    launcher = [sys.executable, "-W", "ignore"]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [
        *launcher,
        "-m",
        "pmpo_megatron.commands.train",
        f"model.path={model}",
        f"run.directory={directory}",
        *SMALL,
        *settings,
    ]


def start(model: str, directory: Path, *settings: str, processes: int = 1) -> subprocess.Popen:
    """A run in a process group of its own, so that all of it can be killed; its output goes to ``directory``.log."""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    with open(f"{directory}.log", "ab") as log:
        started = command(model, directory, *settings, processes=processes)
        output = dict(stdout=log, stderr=subprocess.STDOUT)
        return subprocess.Popen(started, cwd=ROOT, env=environment, start_new_session=True, **output)


def output(directory: Path) -> str:
    return Path(f"{directory}.log").read_text(errors="replace")


def finish(process: subprocess.Popen, directory: Path, *, timeout: float = 200, code: int = 0) -> str:
    """Waits for the run's end; its output."""
    found = process.wait(timeout=timeout)
    assert found == code, f"exit code {found}\n{output(directory)[-5000:]}"
    return output(directory)


def train(model: str, directory: Path, *settings: str, processes: int = 1, code: int = 0) -> str:
    return finish(start(model, directory, *settings, processes=processes), directory, code=code)


def metrics(directory: Path) -> list[dict]:
    """Every line of metrics.jsonl, without what depends on the clock."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if not k.startswith(("time", "throughput")) and not k.endswith("/seconds")}
        for row in rows
    ]


def token_examples(directory: Path, *, step: int) -> dict[int, dict]:
    """The trajectories that round ``step`` recorded token by token, by their number."""
    rows = [json.loads(line) for line in (directory / "tokens.jsonl").read_text().splitlines()]
    return {row["sample_id"]: row for row in rows if row["step"] == step}


def last_round(directory: Path) -> int:
    """Of the newest checkpoint; 0 where there is none."""
    names = [path.name for path in (directory / "checkpoints").glob("round-*") if path.name.removeprefix("round-").isdigit()]
    return max((int(name.removeprefix("round-")) for name in names), default=0)


def checkpoint_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, model and optimizer, by its key."""
    from torch.distributed.checkpoint import FileSystemReader, load

    newest = sorted((directory / "checkpoints").glob("round-*"))[-1] / "megatron"
    reader = FileSystemReader(newest)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {key: entry for key, entry in entries.items() if hasattr(entry, "size")}
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in tensors.items()}
    load(state, storage_reader=reader, no_dist=True)
    return state


def wait_until(condition, *, timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout:g} s"
        time.sleep(0.05)
