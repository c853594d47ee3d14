"""Forward and backward over micro-batches: scoring, and the optimizer step. This file alone owns loss scaling.

Legend: N trajectories of a micro-batch, T tokens on this context-parallel rank, M micro-batches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pmpo_megatron.algo.importance import importance_weights
from pmpo_megatron.algo.objective import ObjectiveConfig, evaluate_objective
from pmpo_megatron.algo.penalties import kl_penalty, mean_entropy
from pmpo_megatron.algo.rejection import Rejection
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.model.micro_batch import MicroBatch, ScoredMicroBatch
from pmpo_megatron.model.optimizer import LearningRateSchedule, apply_gradients
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.model.routing import Routing, add_counts, balance_weights
from pmpo_megatron.model.schedule import run_schedule
from pmpo_megatron.model.step_results import MicroResult, StepResult, collect_results
from pmpo_megatron.parallel.collectives import gather_objects, sum_over
from pmpo_megatron.parallel.liveness import naming_ranks
from pmpo_megatron.parallel.state import ParallelState


def score(
    policy: Policy,
    micro_batches: Sequence[MicroBatch],
    *,
    temperature: float,
    reference: Policy | None = None,
    recompute: bool = True,
    rejection: Rejection | None = None,
    replay: bool = False,
) -> list[ScoredMicroBatch]:
    """Each micro-batch with the log-probs of its response tokens under ``policy`` and ``reference``, without gradient.

    Args:
        recompute: False: those that the rollout engine gave are taken for the policy's.
        rejection: which tokens' gradients count.
        replay: optimizer steps send tokens to the experts that they are sent to here; of a mixture of experts.
    """
    last = policy.state.is_last_stage
    routings = [Routing(item.routing.padding_t, item.routing.told) for item in micro_batches]
    if recompute:
        old = _log_probs_of(policy, micro_batches, routings, temperature=temperature)
    else:
        old = [item.rollout_log_probs_T if last else torch.empty(0) for item in micro_batches]
    others: Sequence[torch.Tensor | None] = [None] * len(micro_batches)
    if reference is not None:
        others = _log_probs_of(reference, micro_batches, temperature=temperature)
    noted = [replace(each, told=(each.routes or each.told) if replay else {}) for each in routings]
    kept: list[torch.Tensor | None] = [None] * len(micro_batches)
    if rejection is not None and last:
        sum_over_shards = sum_over(policy.state.cp_group)
        kept = [
            rejection.kept_tokens(
                log_probs_T, item.rollout_log_probs_T, item.trajectory_T, item.num_trajectories, sum_over_shards
            )
            for item, log_probs_T in zip(micro_batches, old, strict=True)
        ]
    return [ScoredMicroBatch(*parts) for parts in zip(micro_batches, old, others, kept, noted, strict=True)]


def _log_probs_of(
    policy: Policy, micro_batches: Sequence[MicroBatch], routings: Sequence[Routing] | None = None, *, temperature: float
) -> list[torch.Tensor]:
    """Log-probs of every micro-batch as `ScoredMicroBatch` holds them.

    The same model code, packing and chunks as in `optimizer_step`: where the weights did not change in between, the
    numbers are bitwise the same, and a round's first step is exactly on-policy.
    """

    def collect(item: MicroBatch, hidden: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
        return policy.score_hidden_states(hidden, item.targets_T, item.wanted, temperature=temperature, entropy=False)[0]

    work = [(item, functools.partial(collect, item)) for item in micro_batches]
    with torch.no_grad(), naming_ranks("scoring"):
        log_probs = run_schedule(policy, work, routings, forward_only=True)
    return log_probs if policy.state.is_last_stage else [torch.empty(0)] * len(work)


def optimizer_step(
    policy: Policy,
    micro_batches: Sequence[ScoredMicroBatch],
    *,
    objective: ObjectiveConfig,
    progress: float,
    temperature: float,
) -> StepResult:
    """One update of the policy by the gradient of the objective over all micro-batches of all data-parallel ranks.

    Args:
        micro_batches: this data-parallel rank's, equally many on every rank; their weights c_i hold the denominator of
            the whole step (docs/objective.md, "The formulas"). With the reference's log-probs where there is a KL.
        progress: share of training done, for scheduled p.
        temperature: of the distribution that was sampled from; the same as in `score`.

    Raises:
        ConfigError: the policy has no optimizer, a KL has no reference, or the layout cannot take so many micro-batches.

    **Why the gradient is exactly that of the formula.** The loss is a sum over trajectories, J = sum_i c_i A_i M_i, and
    `evaluate_objective` gives, for the tokens on this rank, a surrogate s with exactly their part of dJ. The gradient
    wanted is thus G = sum over data-parallel ranks d, context-parallel ranks c and micro-batches m of grad s(d, c, m).
    Megatron does the following to the scalar l that the loss function returns (``calculate_per_token_loss=False``, two
    values returned; schedules.py, forward_step_calc_loss): l <- l * cp / M. Then DDP sums parameter gradients over the
    dp * cp ranks of the group and scales by 1 / (dp * cp) (distributed_data_parallel.py, gradient_scaling_factor).
    Together: sum over d, c, m of grad l / (dp * M). So l = s * dp * M gives G, with no further denominator anywhere.
    Tensor parallelism: every rank of a tensor group computes the same s, and Megatron's mappings make its own weights'
    gradients whole (that of the hidden states is summed over the group where the output layer begins, see
    `log_probs.score_hidden_states`); gradients of the norms under sequence parallelism are summed in finalize_model_grads.
    Pipeline parallelism: only the last stage returns l; tied embeddings' gradients are summed over first and last stage
    in finalize_model_grads. KL and entropy bring their own denominators and go through the same l.
    """
    if policy.optimizer is None or policy.scheduler is None:
        raise ConfigError("optimizer", "this policy was built without one: it can be scored, not trained")
    _check_arguments(policy, micro_batches, objective)
    state = policy.state
    batches = [item.batch for item in micro_batches]
    step_tokens = _count_response_tokens(batches, state)
    scale = state.dp_size * len(batches)  # the whole of loss scaling; derived above

    def loss(item: ScoredMicroBatch, hidden: torch.Tensor) -> tuple[torch.Tensor, MicroResult]:
        batch = item.batch
        given = (hidden, batch.targets_T, batch.wanted)
        log_probs_T, entropy_T = policy.score_hidden_states(*given, temperature=temperature, entropy=True)
        assert entropy_T is not None  # it was asked for
        terms = _evaluate(item, log_probs_T, entropy_T, objective, progress=progress, step_tokens=step_tokens, state=state)
        return terms.surrogate * scale, terms.detached()  # a tensor of its own: Megatron scales it in place

    work = [(item.batch, functools.partial(loss, item)) for item in micro_batches]
    policy.zero_gradients()
    with naming_ranks("an optimizer step"):
        routings = _routings_of_step(policy, micro_batches, objective.balance_coefficient)
        results = run_schedule(policy, work, routings, forward_only=False)
        totals, trajectories = collect_results(results, batches, state)
    return _update(policy, policy.scheduler, totals, trajectories, step_tokens)


def _evaluate(
    item: ScoredMicroBatch,
    log_probs_T: torch.Tensor,
    entropy_T: torch.Tensor,
    objective: ObjectiveConfig,
    *,
    progress: float,
    step_tokens: float,
    state: ParallelState,
) -> MicroResult:
    """Surrogate of one micro-batch on this rank. Every rank of the context-parallel group makes the same collectives."""
    batch, sum_over_shards = item.batch, sum_over(state.cp_group)
    weights_T = importance_weights(
        item.old_log_probs_T,
        batch.rollout_log_probs_T,
        batch.trajectory_T,
        batch.num_trajectories,
        level=objective.importance,
        cap=objective.importance_cap,
        sum_over_shards=sum_over_shards,
    )
    if item.kept_T is not None:
        kept_T = item.kept_T.to(log_probs_T.dtype)
        weights_T = kept_T if weights_T is None else weights_T * kept_T
    output = evaluate_objective(
        log_probs_T,
        item.old_log_probs_T,
        batch.trajectory_T,
        batch.advantages_N,
        batch.weights_N,
        objective,
        weights_T,
        progress,
        sum_over_shards,
        batch.group_statistics,
    )
    kl, penalty = None, log_probs_T.new_zeros(())
    if item.reference_log_probs_T is not None:
        kl = kl_penalty(
            log_probs_T,
            item.reference_log_probs_T,
            batch.trajectory_T,
            estimator=objective.kl_estimator,
            step_tokens=step_tokens,
        )
        penalty = penalty + objective.kl_coefficient * kl
    entropy = mean_entropy(entropy_T, batch.trajectory_T, step_tokens=step_tokens)
    if objective.entropy_coefficient:
        penalty = penalty - objective.entropy_coefficient * entropy
    return MicroResult(output.surrogate + penalty, output, entropy, kl, penalty)


def _routings_of_step(policy: Policy, micro_batches: Sequence[ScoredMicroBatch], coefficient: float) -> list[Routing]:
    """What each micro-batch's routers are told. Collective where there is a load-balancing loss."""
    noted, balance = [item.routing for item in micro_batches], {}
    if coefficient:
        counts = add_counts(noted, policy.shape, policy.state)
        balance = balance_weights(counts, policy.shape, coefficient, policy.state)
    return [Routing(each.padding_t, each.told, balance) for each in noted]


def _check_arguments(policy: Policy, micro_batches: Sequence[ScoredMicroBatch], objective: ObjectiveConfig) -> None:
    if objective.kl_coefficient and any(item.reference_log_probs_T is None for item in micro_batches):
        raise ConfigError("objective.kl_coefficient", f"{objective.kl_coefficient} needs the log-probs of a reference model")
    interleaved = policy.state.config.virtual_pipeline
    if interleaved and len(micro_batches) % policy.state.pp_size:
        raise ConfigError(
            "parallel.virtual_pipeline",
            f"{len(micro_batches)} micro-batches; the interleaved schedule needs a multiple of pipeline = "
            f"{policy.state.pp_size}: split with micro_batch_multiple",
        )


def _count_response_tokens(batches: list[MicroBatch], state: ParallelState) -> float:
    """Response tokens of the whole step; each micro-batch knows its count over all context-parallel ranks."""
    local = torch.tensor(float(sum(batch.num_response_tokens for batch in batches)), device=state.device)
    return float(sum_over(state.dp_group)(local.double()))


def _update(
    policy: Policy,
    schedule: LearningRateSchedule,
    totals: dict[str, Any],
    trajectories: dict[str, np.ndarray],
    step_tokens: float,
) -> StepResult:
    learning_rate, norm, applied, problem = schedule.learning_rate, float("nan"), False, None
    if totals["non_finite"]:
        problem = (
            f"NaN or inf in the log-probs, or an overflow of weight x advantage, of trajectories {totals['non_finite'][:8]}"
        )
    elif not math.isfinite(totals["loss"]):
        problem = f"the loss is {totals['loss']}"
    else:
        with naming_ranks("the optimizer's update"):
            norm, applied = apply_gradients(policy.optimizer, schedule.config)
        if applied:
            schedule.advance()
        else:
            problem = f"the gradient norm is {norm}; {_name_bad_gradients(policy)}"
    policy.gather.start()
    return StepResult(
        loss=totals["loss"],
        grad_norm=norm,
        learning_rate=learning_rate,
        applied=applied,
        problem=problem,
        trajectories=trajectories,
        entropy=totals["entropy"],
        kl=totals["kl"],
        num_tokens=int(step_tokens),
    )


def _name_bad_gradients(policy: Policy) -> str:
    """The first parameters whose gradient is not finite; only called when the norm already said so."""
    mine = [
        name
        for name, parameter in policy.named_parameters()
        if (gradient := getattr(parameter, "main_grad", None)) is not None and not bool(gradient.isfinite().all())
    ]
    names = sorted({name for part in gather_objects(mine[:8], policy.state) for name in part})
    return f"NaN or inf in the gradient of {', '.join(names[:8])}" if names else "every single gradient is finite"
