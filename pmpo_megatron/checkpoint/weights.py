"""Loads the model's weights, and nothing else, from a distributed checkpoint: a converted one or a run's."""

from __future__ import annotations

from pathlib import Path

from pmpo_megatron.checkpoint.index import INDEX_FILE, read_index
from pmpo_megatron.errors import CheckpointError
from pmpo_megatron.model.policy import Policy

EXTRA_STATE = "_extra_state"  # objects of Megatron's linear layers, empty without float8


def load_model_weights(policy: Policy, directory: str | Path) -> None:
    """Fills ``policy`` from the checkpoint in ``directory``, saved on any layout; its optimizer starts anew. Collective.

    The tensors are converted to the policy's type. Without an optimizer in ``policy`` only its weights change; with one,
    its float32 copies of the weights follow them.

    Raises:
        CheckpointError: ``directory`` is not a distributed checkpoint of this model.
    """
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint import CheckpointException

    read_index(Path(directory) / INDEX_FILE)  # before PyTorch unpickles it
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
