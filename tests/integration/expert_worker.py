"""What the processes of the tests of mixtures run: real vLLMs on CPU that say where they send tokens, and Megatron policies."""

from __future__ import annotations

import numpy as np

from pmpo_megatron.data.packing import pack
from pmpo_megatron.hf.shape import read_shape
from pmpo_megatron.model.micro_batch import prepare
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.model.routing import route_format
from pmpo_megatron.model.step import score
from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down
from pmpo_megatron.rollout.config import SamplingConfig
from pmpo_megatron.types import Rollout, RolloutGroup, Sample
from tests.integration.engine_worker import engine_for, prompts

SAMPLED = SamplingConfig(samples_per_prompt=2, max_tokens=24)


def rollouts_with_routes(path: str, settings: dict) -> list[RolloutGroup]:
    """Sampled responses of an engine that gives its routes."""
    engine = engine_for(path, routes=route_format(read_shape(path)), **settings)
    groups = engine.generate(prompts(), SAMPLED, round_index=0)
    engine.close()
    return groups


def mismatch(path: str, engine_dtypes: tuple[str, ...]) -> list[dict[str, np.ndarray]]:
    """For each type: |float32 trainer - engine| log-probs of sampled tokens, with the routers' own routes and the engine's."""
    state = initialize(ParallelConfig(), device="cpu")
    policy = Policy.build(ModelConfig(path=path, dtype="float32"), None, ParallelConfig(), state)
    found = []
    for dtype in engine_dtypes:
        groups, gaps = rollouts_with_routes(path, dict(dtype=dtype)), {}
        samples = [sample_of(group, rollout) for group in groups for rollout in group.rollouts]
        for name, told in (("own", None), ("engine's", route_format(policy.shape))):
            packed = pack(samples, [1.0] * len(samples), sequence_multiple=1, routes=told)
            [scored] = score(policy, [prepare(packed, state)], temperature=1.0)
            differences = (scored.old_log_probs_T - scored.batch.rollout_log_probs_T).abs()
            gaps[name] = differences[scored.batch.trajectory_T >= 0].numpy()
        found.append(gaps)
    shut_down()
    return found


def sample_of(group: RolloutGroup, rollout: Rollout) -> Sample:
    return Sample(0, 0, group.prompt.token_ids, rollout.token_ids, rollout.log_probs, False, 0.0, routes=rollout.routes)
