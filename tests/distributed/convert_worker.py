"""What the processes of the conversion tests run."""

from __future__ import annotations

from pathlib import Path

import torch

from pmpo_megatron.algo.objective import PRESETS
from pmpo_megatron.checkpoint.config import CheckpointConfig
from pmpo_megatron.checkpoint.index import EXTRA_STATE
from pmpo_megatron.checkpoint.store import CheckpointStore, load_sharded
from pmpo_megatron.errors import CheckpointError
from pmpo_megatron.model.micro_batch import prepare
from pmpo_megatron.model.optimizer import OptimizerConfig
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.model.step import optimizer_step, score
from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down
from tests.distributed.parity_worker import TEMPERATURE, prepared, whole_batch
from tests.weights import whole_weights


def load_model_weights(policy: Policy, directory: str | Path) -> None:
    """Fills ``policy`` from the checkpoint in ``directory``, saved on any layout; its optimizer starts anew. Collective.

    The tensors are converted to the policy's type. Without an optimizer in ``policy`` only its weights change; with one,
    its float32 copies of the weights follow them.

    Raises:
        CheckpointError: ``directory`` is not a distributed checkpoint of this model.
    """
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import CheckpointException

    wanted = {}
    for index, module in enumerate(policy.modules):
        described = module.sharded_state_dict()
        wanted[f"model{index}"] = {name: value for name, value in described.items() if EXTRA_STATE not in name}
    try:
        loaded = dist_checkpointing.load(wanted, str(directory))
    except CheckpointException as error:  # a BaseException that wraps what each rank raised
        [(first, _), *_] = error.failures.values()
        raise CheckpointError(f"{directory}: does not fit this model: {first}") from error
    except (KeyError, ValueError, RuntimeError, OSError, dist_checkpointing.core.CheckpointingException) as error:
        raise CheckpointError(f"{directory}: does not fit this model: {error}") from error
    for index, module in enumerate(policy.modules):
        result = module.load_state_dict(loaded[f"model{index}"], strict=False)
        absent = [name for name in result.missing_keys if EXTRA_STATE not in name]
        if absent or result.unexpected_keys:
            raise CheckpointError(f"{directory}: not loaded: {', '.join([*absent, *result.unexpected_keys][:6])}")
    if policy.optimizer is not None:
        policy.optimizer.reload_model_params()


def load_layouts(layouts: list[dict], cases: list[tuple[str, str, str]]) -> list[dict]:
    """On each layout: a policy built from (other weights), then filled from the converted checkpoint.

    Args:
        cases: (name, Hugging Face directory with other weights of the same shape, converted checkpoint).

    Returns:
        For each layout {name: (shards by Megatron name, log-probs of the trajectories or None off the last stage)}.
    """
    found = []
    for layout in layouts:
        parallel = ParallelConfig(**layout)
        state = initialize(parallel, device="cpu")
        results = {"pieces": {expert: state.tensor_piece(expert=expert) for expert in (False, True)}}
        for name, other, checkpoint in cases:
            policy = Policy.build(ModelConfig(path=other), None, parallel, state)
            load_model_weights(policy, checkpoint)
            shards = {key: value.detach().clone() for key, value in policy.named_parameters()}
            results[name] = shards, scores(policy)
            load_sharded(policy, Path(checkpoint))  # what resumes a run accepts it, too
            assert all(torch.equal(value, shards[key]) for key, value in policy.named_parameters()), name
        found.append(results)
        shut_down(keep_world=True)
    shut_down()
    return found


def scores(policy: Policy) -> torch.Tensor | None:
    """Log-probs of every response token of `samples`, in one micro-batch; None where this rank has not the last stage."""
    batches = [prepare(whole_batch(), policy.state)] * 2  # the interleaved schedule needs as many as pipeline stages
    result = score(policy, batches, temperature=TEMPERATURE)[0]
    return result.old_log_probs_T if policy.state.is_last_stage else None


def train_and_save(path: str, root: str, layouts: dict[str, dict]) -> dict[str, dict]:
    """Two updates and a run's checkpoint in ``root/NAME`` on each layout.

    Returns:
        For each layout the whole weights by Hugging Face name, put together (rank 0; empty elsewhere).
    """
    weights = {}
    for name, layout in layouts.items():
        parallel = ParallelConfig(**layout)
        state = initialize(parallel, device="cpu")
        policy = Policy.build(ModelConfig(path=path), OptimizerConfig(learning_rate=0.01), parallel, state)
        scored = score(policy, prepared(state), temperature=TEMPERATURE)
        for _ in range(2):
            optimizer_step(policy, scored, objective=PRESETS["pmpo"], progress=0.0, temperature=TEMPERATURE)
        CheckpointStore(f"{root}/{name}", CheckpointConfig(), policy).save(1, {"round": 1}, required=True)
        weights[name] = whole_weights(policy)
        shut_down(keep_world=True)
    shut_down()
    return weights


def refusals(path: str, directories: list[str]) -> list[str]:
    """What `load_model_weights` says to each directory, which does not fit the model in ``path``."""
    parallel = ParallelConfig()
    policy = Policy.build(ModelConfig(path=path), None, parallel, initialize(parallel, device="cpu"))
    messages = []
    for directory in directories:
        try:
            load_model_weights(policy, directory)
        except CheckpointError as error:
            messages.append(str(error))
    shut_down()
    return messages
