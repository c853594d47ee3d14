"""Which rollout engine a run gets."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from pmpo_megatron.rollout.config import ENGINES, RolloutConfig
from pmpo_megatron.rollout.engine import RolloutEngine
from pmpo_megatron.rollout.remote_process import NodeAddress
from pmpo_megatron.rollout.replay import RecordingEngine


def make_engine(
    config: RolloutConfig,
    *,
    model_path: str,
    device: str,
    worker_extension: str | None,
    nodes: Sequence[NodeAddress] = (),
    in_flight: bool = False,
) -> RolloutEngine:
    """The engine that ``config`` asks for, ready to generate with the weights of ``model_path``.

    Args:
        device: ``cpu`` or ``cuda``.
        worker_extension: import path ``package.module.Class`` of a class whose methods become vLLM workers'.
        nodes: on which engines are started, too.
        in_flight: weights will change in the middle of responses.

    Raises:
        RolloutError: it does not start; with the end of its log.
        DataError: recorded rollouts cannot be read.
    """
    module, _, name = ENGINES[config.engine].partition(":")
    kind = getattr(importlib.import_module(module), name)
    about = dict(model_path=model_path, device=device, worker_extension=worker_extension, nodes=nodes, in_flight=in_flight)
    engine = kind(config, **about)
    return engine if config.record_to is None else RecordingEngine(engine, config.record_to)
