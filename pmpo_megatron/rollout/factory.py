"""Which rollout engine a run gets."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from pmpo_megatron.rollout.config import ENGINES, EpisodeConfig, RolloutConfig
from pmpo_megatron.rollout.engine import RolloutEngine
from pmpo_megatron.rollout.remote_process import NodeAddress
from pmpo_megatron.rollout.replay import RecordingEngine
from pmpo_megatron.types import RouteFormat


def make_engine(
    config: RolloutConfig,
    *,
    model_path: str,
    device: str,
    worker_extension: str | None,
    nodes: Sequence[NodeAddress] = (),
    in_flight: bool = False,
    routes: RouteFormat | None = None,
    logs: Path | None = None,
    episode: EpisodeConfig = EpisodeConfig(),  # noqa: B008  frozen
    longest_prompt: int = 0,
) -> RolloutEngine:
    """The engine that ``config`` asks for, ready to generate with the weights of ``model_path``.

    Args:
        device: ``cpu`` or ``cuda``.
        worker_extension: import path ``package.module.Class`` of a class whose methods become vLLM workers'.
        nodes: on which engines are started, too.
        in_flight: weights will change in the middle of responses.
        routes: the responses come with their tokens' routes in this format; the worker extension is a `RouteRecorder`.
        logs: a directory for what the engines of this node write; None: not kept.
        episode: what makes trajectories of several turns; recorded ones need none.
        longest_prompt: tokens of the data's prompts at most, for episodes.

    Raises:
        RolloutError: it does not start; with the first error in its log.
        DataError: recorded rollouts cannot be read.
    """
    module, _, name = ENGINES[config.engine].partition(":")
    kind = getattr(importlib.import_module(module), name)
    where = dict(device=device, nodes=nodes, logs=logs)
    what = dict(in_flight=in_flight, routes=routes)
    engine = kind(config, model_path=model_path, worker_extension=worker_extension, **what, **where)
    if episode.function is not None and config.engine != "replay":
        from pmpo_megatron.rollout.episodes import EpisodeEngine  # with an HTTP server

        divided = config.sharing == "divided"
        engine = EpisodeEngine(engine, episode, model_path=model_path, longest_prompt=longest_prompt, divided=divided)
    return engine if config.record_to is None else RecordingEngine(engine, config.record_to)
