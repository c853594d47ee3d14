"""What the processes of the parity tests run: one layout after another, in the same processes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from pmpo_megatron.algo.objective import PRESETS, ObjectiveConfig
from pmpo_megatron.config import build
from pmpo_megatron.data.packing import pack
from pmpo_megatron.model import step as step_module
from pmpo_megatron.model.micro_batch import MicroBatch, ScoredMicroBatch, prepare
from pmpo_megatron.model.optimizer import OptimizerConfig
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.model.schedule import run_schedule
from pmpo_megatron.model.step import optimizer_step, score
from pmpo_megatron.parallel.shards import join_context_shards
from pmpo_megatron.parallel.state import ParallelConfig, ParallelState, initialize, shut_down
from pmpo_megatron.types import PackedTrajectories, RouteFormat, Sample
from tests.weights import whole_weights

VOCAB = 250
PROMPTS = (5, 20, 3, 8, 1, 12)
RESPONSES = (4, 33, 17, 9, 25, 30)  # the first one's tokens all lie with context-parallel rank 1 of 2 (see micro_batches)
TOLD = {1: slice(5, 12), 4: slice(0, 4)}  # tokens of these trajectories that were told to the policy
SAMPLED_TOKENS = sum(RESPONSES) - 7 - 4
TEMPERATURE = 0.8
TYPICAL = -5.0  # of the fake rollout log-probs, whose scatter is also the staleness of the old log-probs
STEPS = (
    PRESETS["pmpo"],
    build(
        ObjectiveConfig,
        {"preset": "grpo", "kl_coefficient": 0.3, "entropy_coefficient": 0.05, "importance": "sequence"},
    ),
)


def samples() -> tuple[list[Sample], list[float]]:
    """Six trajectories, stale enough that clipping binds, with advantages of both signs; and their unequal weights."""
    rng = np.random.default_rng(11)
    made, weights = [], []
    for index, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        sampled = np.ones(response, dtype=np.bool_)
        sampled[TOLD.get(index, slice(0, 0))] = False
        made.append(
            Sample(
                sample_id=100 + index,
                group_id=0,
                prompt_ids=rng.integers(0, VOCAB, prompt).astype(np.int32),
                response_ids=rng.integers(0, VOCAB, response).astype(np.int32),
                rollout_log_probs=(TYPICAL + 0.5 * rng.standard_normal(response)).astype(np.float32),
                truncated=False,
                advantage=float(rng.standard_normal()),
                sampled=None if sampled.all() else sampled,
            )
        )
        weights.append(float(rng.uniform(0.05, 0.3)))
    return made, weights


def whole_batch() -> PackedTrajectories:
    """All of `samples` in one micro-batch."""
    return pack(*samples(), sequence_multiple=16)


def micro_batches(
    dp_size: int, dp_rank: int, multiple: int, given: list[Sample] | None = None, routes: RouteFormat | None = None
) -> list[PackedTrajectories]:
    """Uneven micro-batches of this data-parallel rank; padding to 16 gives trajectory 100 to one context rank only.

    Of ``given`` in the place of `samples`, whose routes are in the format ``routes``.
    """
    if dp_size == 1:
        split = [[0], [1, 2], [3, 4], [5]] if multiple > 1 else [[0], [1, 2], [3, 4, 5]]
    else:
        split = {2: ([[1, 2], [0]], [[3, 4, 5], []]), 4: ([[0], [1]], [[2], []], [[3], [4]], [[5], []])}[dp_size][dp_rank]
    made, weights = samples()
    made = given or made
    return [pack([made[i] for i in each], [weights[i] for i in each], sequence_multiple=16, routes=routes) for each in split]


def prepared(state: ParallelState) -> list[MicroBatch]:
    """`micro_batches` of this rank, prepared."""
    multiple = state.pp_size * (state.config.virtual_pipeline or 0)
    return [prepare(packed, state) for packed in micro_batches(state.dp_size, state.dp_rank, multiple)]


def staled(scored: ScoredMicroBatch) -> ScoredMicroBatch:
    """As if the old log-probs, which the reference's equal, were of another policy: off by the fake rollouts' scatter."""
    batch, old_T = scored.batch, scored.old_log_probs_T
    shift_T = torch.where(batch.trajectory_T >= 0, batch.rollout_log_probs_T - TYPICAL, 0.0)
    old_T = old_T + shift_T if len(old_T) else old_T  # only the last pipeline stage has any
    return replace(scored, old_log_probs_T=old_T, reference_log_probs_T=old_T)


def run_layouts(layouts: list[dict], paths: dict[str, str], task: str) -> list[dict]:
    """``task`` ("train" or "logits") for each model on each layout; results of this rank."""
    results = []
    for layout in layouts:
        options = dict(layout)
        recompute, distributed = options.pop("recompute", "none"), options.pop("distributed", True)
        parallel = ParallelConfig(**options)
        state = initialize(parallel, device="cpu")
        found = {expert: state.tensor_piece(expert=expert)[0] for expert in (False, True)}
        for name, path in paths.items():
            model = ModelConfig(path=path, recompute=recompute, log_prob_chunk=13)
            found[name] = train(model, parallel, state, distributed) if task == "train" else logits(model, parallel, state)
        results.append(found)
        shut_down(keep_world=True)
    shut_down()
    return results


def gather_tensor(shard: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Every rank's ``shard`` (equal shapes) in the group's rank order."""
    results = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(results, shard.contiguous(), group=group)
    return results


def train(model: ModelConfig, parallel: ParallelConfig, state, distributed: bool) -> dict:
    """Two optimizer steps, with what the update saw of each parameter's gradient."""
    # Adam's epsilon is large so that an update is smooth in the gradient, not its sign: rounding stays rounding.
    optimizer = OptimizerConfig(learning_rate=0.02, epsilon=0.05, weight_decay=0.1, clip_grad=0.5, distributed=distributed)
    policy = Policy.build(model, optimizer, parallel, state)
    streamed = whole_weights(policy)
    batches = prepared(state)
    empty = sum(batch.num_trajectories > 0 and not len(batch.wanted) for batch in batches)
    stale = [staled(scored) for scored in score(policy, batches, temperature=TEMPERATURE)]
    gradients, results = [], []
    step_module.apply_gradients = recording(policy, gradients)
    for objective in STEPS:
        results.append(optimizer_step(policy, stale, objective=objective, progress=0.5, temperature=TEMPERATURE))
    values = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    return dict(gradients=gradients, values=values, results=results, empty_shards=empty, streamed=streamed)


def recording(policy: Policy, store: list):
    """`apply_gradients` that first notes every parameter's whole gradient, before clipping."""
    from pmpo_megatron.model.optimizer import apply_gradients

    def apply(optimizer, config):
        if config.distributed:
            complete_buffers(policy)
        store.append({name: parameter.main_grad.detach().clone() for name, parameter in policy.named_parameters()})
        return apply_gradients(optimizer, config)

    return apply


def complete_buffers(policy: Policy) -> None:
    """After Megatron's reduce-scatter each rank holds its part of the gradient buffer: gather the others' parts."""
    from megatron.core import parallel_state

    copies = parallel_state.get_expert_data_parallel_group()
    for chunk in policy.chunks:
        pairs = [(buffer, policy.state.dp_cp_group) for buffer in chunk.buffers]
        for buffer, group in pairs + [(buffer, copies) for buffer in chunk.expert_parallel_buffers]:
            for bucket in buffer.buckets:
                size = bucket.grad_data.numel() // group.size()
                mine = bucket.grad_data[group.rank() * size : (group.rank() + 1) * size].clone()
                dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def logits(model: ModelConfig, parallel: ParallelConfig, state) -> dict:
    """Log-probs and entropies of all response tokens, whole; and logits [T, V] where this layout can give them simply."""
    policy = Policy.build(model, None, parallel, state)
    batches = prepared(state)
    scored, entropies = score(policy, batches, temperature=TEMPERATURE), entropies_of(policy, batches)
    found = {"log_probs": [], "entropy": [], "logits": []}
    if not state.is_last_stage:
        return found
    for batch, item, entropy in zip(batches, scored, entropies, strict=True):
        boundaries = batch.sequences.boundaries
        for name, shard in (("log_probs", item.old_log_probs_T), ("entropy", entropy)):
            found[name].append(join_context_shards(gather_tensor(shard, state.cp_group), boundaries))
    if state.pp_size == 1 and state.cp_size == 1:
        found["logits"] = [full_logits(policy, batch) for batch in batches]
    return found


@torch.no_grad()
def entropies_of(policy: Policy, batches: list[MicroBatch]) -> list[torch.Tensor]:
    """Of every micro-batch, as an optimizer step computes them; empty off the last stage."""

    def collect(batch, hidden, non_loss_data=True):
        return policy.score_hidden_states(hidden, batch.targets_T, batch.wanted, temperature=TEMPERATURE, entropy=True)[1]

    return run_schedule(policy, [(batch, partial(collect, batch)) for batch in batches], forward_only=True)


@torch.no_grad()
def full_logits(policy: Policy, batch: MicroBatch) -> torch.Tensor:
    [model] = policy.modules
    hidden = policy.chunks[0](batch.tokens_1T, batch.position_ids_1T, None, packed_seq_params=batch.sequences)
    weight = model.shared_embedding_or_output_weight() if policy.shape.tied_embeddings else None
    logits = model.output_layer(hidden, weight=weight)[0][:, 0]
    return torch.cat(gather_tensor(logits, policy.state.tp_group), dim=-1)[:, :VOCAB]
