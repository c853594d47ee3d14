"""Forward and backward over micro-batches: scoring, and the optimizer step. This file alone owns loss scaling.

Legend: N trajectories of a micro-batch, L tokens on this context-parallel rank, M micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pmpo_megatron.algo.importance import importance_weights
from pmpo_megatron.algo.objective import ObjectiveConfig, ObjectiveOutput, evaluate_objective
from pmpo_megatron.algo.penalties import kl_penalty, mean_entropy
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.model.inputs import Inputs, prepare_inputs
from pmpo_megatron.model.optimizer import apply_gradients
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.parallel.collectives import gather_objects, sum_over
from pmpo_megatron.parallel.liveness import naming_ranks
from pmpo_megatron.parallel.state import ParallelState
from pmpo_megatron.types import MicroBatch

TRAJECTORY_FIELDS = ("p", "ess", "target_ess", "clip_fraction", "length", "power_mean")


@dataclass(frozen=True)
class TokenScores:
    """float32 [L], detached, on the device: of this context-parallel rank's tokens; 0 where there is no response token."""

    log_probs_T: torch.Tensor
    entropy_T: torch.Tensor


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did; equal on every rank.

    Attributes:
        loss: the objective's loss with its KL and entropy terms, over all trajectories of the step.
        grad_norm: of the whole gradient before clipping; NaN where it was not computed.
        learning_rate: of this update.
        applied: whether weights changed.
        problem: why not, naming trajectories or parameters with NaN or inf; None if all is well.
        trajectories: one array per quantity (sample_id, p, ess, target_ess, clip_fraction, length, power_mean), in the
            same order, of all data-parallel ranks.
        entropy: mean over response tokens, nats.
        kl: mean estimated KL to the reference per response token; None without a reference.
        num_tokens: response tokens of the step.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    applied: bool
    problem: str | None
    trajectories: dict[str, np.ndarray]
    entropy: float
    kl: float | None
    num_tokens: int


def score(policy: Policy, micro_batches: Sequence[MicroBatch], *, temperature: float) -> list[TokenScores | None]:
    """Log-prob and entropy of every response token, without gradient; None on all but the last pipeline stage.

    The same model code, packing and chunks as in `optimizer_step`: where the weights did not change in between, the
    numbers are bitwise the same, and a round's first step is exactly on-policy.
    """
    inputs = [prepare_inputs(micro_batch, policy.state) for micro_batch in micro_batches]

    def collect(_inputs: Inputs, output: torch.Tensor, non_loss_data: bool = True) -> TokenScores:
        return TokenScores(*(part.clone() for part in output[0].detach().unbind(-1)))

    with torch.no_grad(), naming_ranks("scoring"):
        results = _run_schedule(policy, inputs, collect, temperature=temperature, forward_only=True)
    return results if policy.state.is_last_stage else [None] * len(inputs)


def optimizer_step(
    policy: Policy,
    micro_batches: Sequence[MicroBatch],
    old_log_probs: Sequence[TokenScores | torch.Tensor | None],
    *,
    objective: ObjectiveConfig,
    progress: float,
    temperature: float,
    reference_log_probs: Sequence[TokenScores | torch.Tensor | None] | None = None,
    token_weights: Sequence[torch.Tensor | None] | None = None,
) -> StepResult:
    """One update of the policy by the gradient of the objective over all micro-batches of all data-parallel ranks.

    Args:
        micro_batches: this data-parallel rank's, equally many on every rank; their weights c_i hold the denominator of
            the whole step (docs/objective.md, "Settings").
        old_log_probs: for each micro-batch what `score` gave at the start of the round.
        progress: share of training done, for scheduled p.
        temperature: of the distribution that was sampled from; the same as in `score`.
        reference_log_probs: as ``old_log_probs``, of the reference model; needed where the objective has a KL.
        token_weights: detached importance weights [L]; None: computed as ``objective.importance`` says.

    **Why the gradient is exactly that of the formula.** The loss is a sum over trajectories, J = sum_i c_i A_i M_i, and
    `evaluate_objective` gives, for the tokens on this rank, a surrogate s with exactly their part of dJ. The gradient
    wanted is thus G = sum over data-parallel ranks d, context-parallel ranks c and micro-batches m of grad s(d, c, m).
    Megatron does the following to the scalar l that the loss function returns (``calculate_per_token_loss=False``, two
    values returned; schedules.py, forward_step_calc_loss): l <- l * cp / M. Then DDP sums parameter gradients over the
    dp * cp ranks of the group and scales by 1 / (dp * cp) (distributed_data_parallel.py, gradient_scaling_factor).
    Together: sum over d, c, m of grad l / (dp * M). So l = s * dp * M gives G, with no further denominator anywhere.
    Tensor parallelism: every rank of a tensor group computes the same s, and Megatron's mappings make its own weights'
    gradients whole (that of the hidden states is summed over the group where the output layer begins, see
    `log_probs.ScoringHead`); gradients of the norms under sequence parallelism are summed in finalize_model_grads.
    Pipeline parallelism: only the last stage returns l; tied embeddings' gradients are summed over first and last stage
    in finalize_model_grads. KL and entropy bring their own denominators and go through the same l.
    """
    _check_arguments(policy, micro_batches, old_log_probs, objective, reference_log_probs)
    state, count = policy.state, len(micro_batches)
    inputs = [prepare_inputs(micro_batch, state) for micro_batch in micro_batches]
    for index, item in enumerate(inputs):
        item.old_log_probs_T = _log_probs_of(old_log_probs[index])
        item.reference_log_probs_T = _log_probs_of(reference_log_probs[index]) if reference_log_probs else None
        item.token_weights_T = token_weights[index] if token_weights else None
    step_tokens = _count_response_tokens(inputs, state)
    scale = state.dp_size * count  # the whole of loss scaling; derived above

    def loss(item: Inputs, output: torch.Tensor) -> tuple[torch.Tensor, _MicroResult]:
        terms = _evaluate(item, output, objective, progress=progress, step_tokens=step_tokens, state=state)
        return terms.surrogate * scale, terms.detached()  # a tensor of its own: Megatron scales it in place

    policy.zero_gradients()
    with naming_ranks("an optimizer step"):
        results = _run_schedule(
            policy,
            inputs,
            loss,
            temperature=temperature,
            forward_only=False,
            entropy_gradient=objective.entropy_coefficient > 0,
        )
        totals, trajectories = _collect(results, inputs, state)
    return _update(policy, totals, trajectories, step_tokens)


@dataclass(frozen=True)
class _MicroResult:
    """Of one micro-batch; on the device, no synchronisation."""

    surrogate: torch.Tensor
    output: ObjectiveOutput
    entropy: torch.Tensor  # this shard's share of the step's mean
    kl: torch.Tensor | None  # likewise
    penalty: torch.Tensor  # this shard's share of the loss beside the objective

    def detached(self) -> _MicroResult:
        kl = None if self.kl is None else self.kl.detach()
        return _MicroResult(self.surrogate.detach(), self.output, self.entropy.detach(), kl, self.penalty.detach())


def _evaluate(
    item: Inputs,
    output: torch.Tensor,
    objective: ObjectiveConfig,
    *,
    progress: float,
    step_tokens: float,
    state: ParallelState,
) -> _MicroResult:
    """Surrogate of one micro-batch on this rank. Every rank of the context-parallel group makes the same collectives."""
    log_probs_T, entropy_T = output[0].unbind(-1)
    sum_over_shards = sum_over(state.cp_group)
    weights_T = item.token_weights_T
    if weights_T is None:
        weights_T = importance_weights(
            item.old_log_probs_T,
            item.rollout_log_probs_T,
            item.trajectory_T,
            item.num_trajectories,
            level=objective.importance,
            cap=objective.importance_cap,
            sum_over_shards=sum_over_shards,
        )
    found = evaluate_objective(
        log_probs_T,
        item.old_log_probs_T,
        item.trajectory_T,
        item.advantages_N,
        item.weights_N,
        objective,
        weights_T,
        progress,
        sum_over_shards,
    )
    kl, penalty = None, log_probs_T.new_zeros(())
    if item.reference_log_probs_T is not None:
        kl = kl_penalty(
            log_probs_T,
            item.reference_log_probs_T,
            item.trajectory_T,
            estimator=objective.kl_estimator,
            step_tokens=step_tokens,
        )
        penalty = penalty + objective.kl_coefficient * kl
    entropy = mean_entropy(entropy_T, item.trajectory_T, step_tokens=step_tokens)
    if objective.entropy_coefficient:
        penalty = penalty - objective.entropy_coefficient * entropy
    return _MicroResult(found.surrogate + penalty, found, entropy, kl, penalty)


def _run_schedule(
    policy: Policy,
    inputs: list[Inputs],
    loss: Callable,
    *,
    temperature: float,
    forward_only: bool,
    entropy_gradient: bool = False,
) -> list[Any]:
    """Megatron's schedule over ``inputs``; what ``loss`` returned per micro-batch on the last stage, else empty."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(iterator, model):
        item = next(iterator)
        if policy.head is not None:
            policy.head.ask(item.targets_T, item.wanted, temperature=temperature, entropy_gradient=entropy_gradient)
        output = model(item.tokens_1T, item.position_ids_1T, None, packed_seq_params=item.packed)
        return output, lambda output, **kwargs: loss(item, output, **kwargs)

    iterators = [iter(inputs) for _ in policy.chunks]
    run = get_forward_backward_func()
    return run(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(policy.chunks) if len(policy.chunks) > 1 else policy.chunks[0],
        num_microbatches=len(inputs),
        seq_length=max(item.num_tokens for item in inputs),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _log_probs_of(scores: TokenScores | torch.Tensor | None) -> torch.Tensor | None:
    return scores.log_probs_T if isinstance(scores, TokenScores) else scores


def _check_arguments(policy, micro_batches, old_log_probs, objective, reference_log_probs) -> None:
    if policy.optimizer is None:
        raise ConfigError("optimizer", "this policy was built without one: it can be scored, not trained")
    if len(old_log_probs) != len(micro_batches):
        raise ConfigError("old_log_probs", f"{len(old_log_probs)} for {len(micro_batches)} micro-batches")
    if objective.kl_coefficient and reference_log_probs is None:
        raise ConfigError("objective.kl_coefficient", f"{objective.kl_coefficient} needs reference_log_probs")
    interleaved = policy.state.config.virtual_pipeline
    if interleaved and len(micro_batches) % policy.state.pp_size:
        raise ConfigError(
            "parallel.virtual_pipeline",
            f"{len(micro_batches)} micro-batches; the interleaved schedule needs a multiple of pipeline = "
            f"{policy.state.pp_size}: pack with micro_batch_multiple",
        )


def _count_response_tokens(inputs: list[Inputs], state: ParallelState) -> float:
    """Response tokens of the whole step; inputs know their count over all context-parallel ranks."""
    local = torch.tensor(float(sum(item.num_response_tokens for item in inputs)), device=state.device)
    return float(sum_over(state.dp_group)(local.double()))


def _collect(
    results: list[_MicroResult], inputs: list[Inputs], state: ParallelState
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Sums and per-trajectory arrays over the step, on every rank. One all-reduce (data x context) and one gather."""
    mine: tuple[dict[str, Any], dict[str, np.ndarray]] | None = None
    if state.is_last_stage:
        sums = sum_over(state.dp_cp_group)(_sums(results, state))
        if state.tp_rank == 0 and state.cp_rank == 0:
            mine = _to_host(sums, results, inputs)
    given = [item for item in gather_objects(mine, state) if item is not None]
    bad = sorted(sample for totals, _ in given for sample in totals["non_finite"])
    arrays = {name: np.concatenate([found[name] for _, found in given]) for name in ("sample_id", *TRAJECTORY_FIELDS)}
    return given[0][0] | {"non_finite": bad}, arrays


def _sums(results: list[_MicroResult], state: ParallelState) -> torch.Tensor:
    """float64 [3]: loss, entropy, KL. The objective's loss is equal on all shards of a trajectory: counted once."""
    zero = torch.zeros((), dtype=torch.float64, device=state.device)
    loss = sum((r.output.loss.double() / state.cp_size + r.penalty.double() for r in results), zero)
    entropy = sum((r.entropy.double() for r in results), zero)
    kl = sum((r.kl.double() for r in results if r.kl is not None), zero)
    return torch.stack([loss, entropy, kl])


def _to_host(
    sums: torch.Tensor, results: list[_MicroResult], inputs: list[Inputs]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The one synchronisation of a step before the update."""
    columns = [torch.cat([getattr(r.output, f"{name}_N").double() for r in results]) for name in TRAJECTORY_FIELDS]
    columns.append(torch.cat([r.output.non_finite_N for r in results]).double())
    table = torch.stack(columns).cpu().numpy()
    loss, entropy, kl = sums.tolist()
    sample_ids = np.array([sample for item in inputs for sample in item.sample_ids], dtype=np.int64)
    arrays = dict(zip(TRAJECTORY_FIELDS, table, strict=False)) | {"sample_id": sample_ids}
    totals = {
        "loss": loss,
        "entropy": entropy,
        "kl": kl if any(r.kl is not None for r in results) else None,
        "non_finite": sample_ids[table[-1] > 0].tolist(),
    }
    return totals, arrays


def _update(policy: Policy, totals: dict[str, Any], trajectories: dict[str, np.ndarray], step_tokens: float) -> StepResult:
    learning_rate, norm, applied, problem = policy.scheduler.learning_rate, float("nan"), False, None
    if totals["non_finite"]:
        problem = f"NaN or inf in the log-probs of trajectories {totals['non_finite'][:8]}"
    elif not math.isfinite(totals["loss"]):
        problem = f"the loss is {totals['loss']}"
    else:
        with naming_ranks("the optimizer's update"):
            norm, applied = apply_gradients(policy.optimizer, policy.scheduler.config)
        if applied:
            policy.scheduler.advance()
        else:
            problem = f"the gradient norm is {norm}; {_name_bad_gradients(policy)}"
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
        if getattr(parameter, "main_grad", None) is not None and not bool(parameter.main_grad.isfinite().all())
    ]
    names = sorted({name for part in gather_objects(mine[:8], policy.state) for name in part})
    return f"NaN or inf in the gradient of {', '.join(names[:8])}" if names else "every single gradient is finite"
