"""What the process of test_gradient.py runs: two optimizer steps from stale log-probs, and what they were given."""

from __future__ import annotations

import torch

from pmpo_megatron.model import step as step_module
from pmpo_megatron.model.optimizer import OptimizerConfig
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.model.step import optimizer_step, score
from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down
from tests.distributed.parity_worker import STEPS, TEMPERATURE, prepared, recording, staled

OPTIMIZER = OptimizerConfig(learning_rate=0.02, epsilon=0.05, weight_decay=0.1, clip_grad=0.25)


def two_steps(path: str, number: int) -> dict:
    """`STEPS`[number] as the first step, and the other one as the second, so that the two gradients differ.

    Returns each step's gradients and result, weights before the first and after the second, and the old log-probs.
    """
    parallel = ParallelConfig()
    state = initialize(parallel, device="cpu")
    policy = Policy.build(ModelConfig(path=path, log_prob_chunk=13), OPTIMIZER, parallel, state)
    gradients, before = [], values_of(policy)
    stale = [staled(scored) for scored in score(policy, prepared(state), temperature=TEMPERATURE)]
    step_module.apply_gradients = recording(policy, gradients)
    results = [
        optimizer_step(policy, stale, objective=objective, progress=0.5, temperature=TEMPERATURE)
        for objective in (STEPS[number], STEPS[1 - number])
    ]
    after = values_of(policy)
    shut_down()
    old = [scored.old_log_probs_T for scored in stale]
    return {"before": before, "after": after, "gradients": gradients, "old": old, "results": results}


def values_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
