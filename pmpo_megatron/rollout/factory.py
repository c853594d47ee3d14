"""Which rollout engine a run gets."""

from __future__ import annotations

from collections.abc import Sequence

from pmpo_megatron.rollout.config import RolloutConfig
from pmpo_megatron.rollout.engine import RolloutEngine
from pmpo_megatron.rollout.replay import RecordingEngine, ReplayEngine
from pmpo_megatron.rollout.server_engine import ServerEngine
from pmpo_megatron.rollout.vllm_engine import VLLMEngine
from pmpo_megatron.rollout.vllm_process import NodeAddress


def make_engine(
    config: RolloutConfig,
    *,
    model_path: str,
    device: str,
    worker_extension: str | None,
    nodes: Sequence[NodeAddress] = (),
) -> RolloutEngine:
    """The engine that ``config`` asks for, ready to generate with the weights of ``model_path``.

    Args:
        device: ``cpu`` or ``cuda``.
        worker_extension: import path ``package.module.Class`` of a class whose methods become vLLM workers'.
        nodes: engine vllm: other nodes on which engines are started, too.

    Raises:
        RolloutError: it does not start; with the end of its log.
        DataError: recorded rollouts cannot be read.
    """
    if config.engine == "replay" and config.replay_from is not None:
        return ReplayEngine(config.replay_from)
    engine: RolloutEngine
    if config.engine == "server":
        engine = ServerEngine(config)
    else:
        engine = VLLMEngine(config, model_path=model_path, device=device, worker_extension=worker_extension, nodes=nodes)
    if config.record_to is not None:
        return RecordingEngine(engine, config.record_to)
    return engine
