"""Terms beside the objective: KL to a reference model and the entropy bonus, each with a denominator of its own.

Both are sums over this rank's response tokens divided by the response tokens of the whole optimizer step (all
micro-batches, all ranks): added to the surrogate, they need no further normalisation, and never inherit the objective's.
"""

from __future__ import annotations

import torch

from pmpo_megatron.algo.sums import LOG_RATIO_LIMIT


def kl_penalty(
    log_probs_T: torch.Tensor,
    reference_log_probs_T: torch.Tensor,
    trajectory_T: torch.Tensor,
    *,
    estimator: str,
    step_tokens: float,
) -> torch.Tensor:
    """This rank's share of the estimated KL(policy || reference) per token, 0-d with gradient.

    Estimators (J. Schulman, "Approximating KL divergence", 2020), with d = log policy - log reference on sampled tokens:
    k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d. Differentiated as a loss, k2 gives the gradient of the true KL on policy;
    k3's is that of the reverse direction to first order; k1's has expectation 0 and serves to measure, not to train.
    """
    d_T = (log_probs_T - reference_log_probs_T.detach()).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    value_T = {"k1": lambda: d_T, "k2": lambda: d_T**2 / 2, "k3": lambda: torch.expm1(-d_T) + d_T}[estimator]()
    return torch.where(trajectory_T >= 0, value_T, 0.0).sum() / max(step_tokens, 1.0)


def mean_entropy(entropy_T: torch.Tensor, trajectory_T: torch.Tensor, *, step_tokens: float) -> torch.Tensor:
    """This rank's share of the mean entropy per response token, in nats, 0-d with gradient. Subtract it for a bonus."""
    return torch.where(trajectory_T >= 0, entropy_T, 0.0).sum() / max(step_tokens, 1.0)
