"""Recorded rollouts: written by any run, read back as an engine for debugging and for exact tests.

One JSON line for each call of `generate`: the round, the prompts' indices, and every response. Floats are written with
enough digits to come back bit by bit, a mixture's routes, where the engine gave them, as their bytes in base64.
"""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pmpo_megatron.errors import DataError, RolloutError
from pmpo_megatron.rollout.config import RolloutConfig, SamplingConfig
from pmpo_megatron.rollout.engine import EngineAround, RolloutEngine
from pmpo_megatron.types import Episode, Prompt, Rollout, RolloutGroup, RouteFormat, to_token_ids

FORMAT = 1


class RecordingEngine(EngineAround):
    """Another engine, whose rollouts are also appended to a file."""

    def __init__(self, engine: RolloutEngine, path: str | Path) -> None:
        super().__init__(engine)
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._round: int | None = None
        self._calls = 0  # within the round: dynamic sampling asks several times

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, round_index: int) -> list[RolloutGroup]:
        groups = self._engine.generate(prompts, sampling, round_index=round_index)
        self._calls = self._calls + 1 if round_index == self._round else 0
        self._round = round_index
        groups_json = [_group_to_json(group) for group in groups]
        record = {"format": FORMAT, "round": round_index, "call": self._calls, "groups": groups_json}
        with self._path.open("a") as file:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
        return groups


class ReplayEngine:
    """Gives back recorded rollouts by round and prompt. It holds no weights: an update changes its version only."""

    hosts: tuple[str, ...] = ()

    def __init__(self, config: RolloutConfig, *, routes: RouteFormat | None = None, **_: Any) -> None:
        assert config.replay_from is not None, "RolloutConfig asks for it"
        self.path, self.version, self._routes = Path(config.replay_from), 0, routes
        self.on_restart: Callable[[Any], None] | None = None
        self._rounds: dict[int, dict[int, list[list[Rollout]]]] = defaultdict(lambda: defaultdict(list))
        for number, line in enumerate(self._lines(), 1):
            self._read(number, line)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, round_index: int) -> list[RolloutGroup]:
        recorded = self._rounds.get(round_index, {})
        taken: dict[int, int] = defaultdict(int)
        groups = []
        for prompt in prompts:
            available = recorded.get(prompt.index, [])
            if taken[prompt.index] >= len(available):
                raise RolloutError(
                    f"{self.path}: holds no responses to prompt {prompt.index} in round {round_index}; it was recorded with "
                    "other data, another seed, or fewer rounds"
                )
            rollouts = available[taken[prompt.index]]
            taken[prompt.index] += 1
            if len(rollouts) != sampling.samples_per_prompt:
                raise RolloutError(
                    f"{self.path}: {len(rollouts)} responses to prompt {prompt.index} in round {round_index}, but "
                    f"sampling.samples_per_prompt is {sampling.samples_per_prompt}"
                )
            groups.append(RolloutGroup(prompt, tuple(rollouts)))
        return groups

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, round_index: int) -> list[Future[RolloutGroup]]:
        futures: list[Future[RolloutGroup]] = [Future() for _ in prompts]
        for future, group in zip(futures, self.generate(prompts, sampling, round_index=round_index), strict=True):
            future.set_result(group)
        return futures

    @contextmanager
    def update(self, version: int) -> Iterator[None]:
        yield
        self.version = version

    def collective_rpc(self, method: str, *arguments: Any) -> list[Any]:
        return []

    def revive(self) -> None:
        """Nothing to start."""

    def close(self) -> None:
        """Nothing to end."""

    def _lines(self) -> list[str]:
        try:
            return self.path.read_text().splitlines()
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}") from None

    def _read(self, number: int, line: str) -> None:
        where = f"{self.path}:{number}"
        try:
            record = json.loads(line)
            if record["format"] != FORMAT:
                raise DataError(f"format {record['format']}; this version reads {FORMAT}")
            groups = [(group["prompt"], [_rollout(r, self._routes) for r in group["rollouts"]]) for group in record["groups"]]
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}: damaged or cut short: {error!r}") from None
        # A round that was repeated after a resume stands twice: the later one is what the run went on with.
        if record["call"] == 0:
            self._rounds[record["round"]].clear()
        for prompt, rollouts in groups:
            self._rounds[record["round"]][prompt].append(rollouts)


def _group_to_json(group: RolloutGroup) -> dict[str, Any]:
    rollouts = [
        {
            "token_ids": r.token_ids.tolist(),
            "log_probs": [float(x) for x in r.log_probs],
            "text": r.text,
            "finish_reason": r.finish_reason,
            "policy_version": r.policy_version,
            "seed": r.seed,
            **({} if r.episode is None else {"episode": _episode_to_json(r.episode)}),
        }
        | ({} if r.routes is None else {"routes": base64.b64encode(r.routes.tobytes()).decode()})
        for r in group.rollouts
    ]
    return {"prompt": group.prompt.index, "problem": group.prompt.text, "rollouts": rollouts}


def _episode_to_json(episode: Episode) -> dict[str, Any]:
    return asdict(episode) | {"prompt_ids": episode.prompt_ids.tolist(), "sampled": episode.sampled.astype(int).tolist()}


def _rollout(record: dict[str, Any], routes: RouteFormat | None) -> Rollout:
    token_ids, log_probs = to_token_ids(record["token_ids"]), np.array(record["log_probs"], dtype=np.float32)
    if len(log_probs) != len(token_ids):
        raise ValueError(f"{len(token_ids)} tokens but {len(log_probs)} log-probs")
    versions = np.full(len(log_probs), record["policy_version"], dtype=np.int32)
    experts = None
    if routes is not None:
        if "routes" not in record:
            raise DataError("holds no routes of a mixture's tokens; record with round.routing_replay rollout")
        experts = np.frombuffer(base64.b64decode(record["routes"]), dtype=routes.dtype)
        experts = experts.reshape(-1, routes.layers, routes.per_token)
    episode = None
    if (values := record.get("episode")) is not None:
        arrays = {"prompt_ids": to_token_ids(values["prompt_ids"]), "sampled": np.array(values["sampled"], dtype=np.bool_)}
        episode = Episode(**(values | arrays))
    return Rollout(
        token_ids,
        log_probs,
        record["text"],
        record["finish_reason"],
        versions,
        record["seed"],
        routes=experts,
        episode=episode,
    )
