"""What the process of test_gradient.py runs: one optimizer step from stale log-probs, and what it was given."""

from __future__ import annotations

import torch

from pmpo_megatron.model import step as step_module
from pmpo_megatron.model.optimizer import OptimizerConfig
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.model.step import TokenScores, optimizer_step, score
from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down
from tests.distributed.parity_worker import STEPS, TEMPERATURE, TYPICAL, micro_batches, recording

OPTIMIZER = OptimizerConfig(learning_rate=0.02, epsilon=0.05, weight_decay=0.1, clip_grad=0.25)


def first_step(path: str, number: int) -> dict:
    """`STEPS`[number] as the first step: gradients, weights before and after, the old log-probs it was given, its result."""
    parallel = ParallelConfig()
    state = initialize(parallel, device="cpu")
    policy = Policy.build(ModelConfig(path=path, log_prob_chunk=13), OPTIMIZER, parallel, state)
    batches, stale, gradients, before = micro_batches(1, 0, 0), [], [], values_of(policy)
    for batch, scores in zip(batches, score(policy, batches, temperature=TEMPERATURE), strict=True):
        shift = torch.where(batch.trajectory_T >= 0, batch.rollout_log_probs_T - TYPICAL, 0.0)
        stale.append(TokenScores(scores.log_probs_T + shift, scores.entropy_T))
    step_module.apply_gradients = recording(policy, gradients)
    result = optimizer_step(
        policy, batches, stale, objective=STEPS[number], progress=0.5, temperature=TEMPERATURE,
        reference_log_probs=stale if STEPS[number].kl_coefficient else None,
    )  # fmt: skip
    after = values_of(policy)
    shut_down()
    weights = {"before": before, "after": after}
    return weights | {"gradients": gradients[0], "old": [scores.log_probs_T for scores in stale], "result": result}


def values_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
