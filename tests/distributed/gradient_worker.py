"""What the process of test_gradient.py runs: two optimizer steps from stale log-probs, and what they were given."""

from __future__ import annotations

import torch

from pmpo_megatron.model import step as step_module
from pmpo_megatron.model.optimizer import OptimizerConfig
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.model.step import TokenScores, optimizer_step, score
from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down
from tests.distributed.parity_worker import STEPS, TEMPERATURE, TYPICAL, micro_batches, recording

OPTIMIZER = OptimizerConfig(learning_rate=0.02, epsilon=0.05, weight_decay=0.1, clip_grad=0.25)


def two_steps(path: str, number: int) -> dict:
    """`STEPS`[number] as the first step, and the other one as the second, so that the two gradients differ.

    Returns each step's gradients and result, weights before the first and after the second, and the old log-probs.
    """
    parallel = ParallelConfig()
    state = initialize(parallel, device="cpu")
    policy = Policy.build(ModelConfig(path=path, log_prob_chunk=13), OPTIMIZER, parallel, state)
    batches, stale, gradients, before = micro_batches(1, 0, 0), [], [], values_of(policy)
    for batch, scores in zip(batches, score(policy, batches, temperature=TEMPERATURE), strict=True):
        shift = torch.where(batch.trajectory_T >= 0, batch.rollout_log_probs_T - TYPICAL, 0.0)
        stale.append(TokenScores(scores.log_probs_T + shift, scores.entropy_T))
    step_module.apply_gradients = recording(policy, gradients)
    results = [
        optimizer_step(
            policy, batches, stale, objective=objective, progress=0.5, temperature=TEMPERATURE,
            reference_log_probs=stale if objective.kl_coefficient else None,
        )
        for objective in (STEPS[number], STEPS[1 - number])
    ]  # fmt: skip
    after = values_of(policy)
    shut_down()
    old = [scores.log_probs_T for scores in stale]
    return {"before": before, "after": after, "gradients": gradients, "old": old, "results": results}


def values_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
