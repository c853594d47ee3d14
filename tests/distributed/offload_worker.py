"""What the processes of test_offload.py run."""

from __future__ import annotations

from pathlib import Path

import torch

from pmpo_megatron.algo.objective import PRESETS
from pmpo_megatron.checkpoint.config import CheckpointConfig
from pmpo_megatron.checkpoint.store import CheckpointStore
from pmpo_megatron.model import offload
from pmpo_megatron.model.optimizer import OptimizerConfig
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.model.step import optimizer_step, score
from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down
from tests.distributed.parity_worker import TEMPERATURE, prepared
from tests.weights import whole_weights


def train_in_every_mode(path: str, root: str, layout: dict, dtype: str, distributed: bool) -> dict:
    """Weights after three rounds by mode, with a checkpoint after the second; ``resumed`` goes on from there."""
    parallel = ParallelConfig(**layout)
    optimizer = OptimizerConfig(learning_rate=0.003, distributed=distributed)
    found = {}
    for name, first, mode in (
        ("never", 1, None),
        ("none", 1, "none"),
        ("optimizer", 1, "optimizer"),
        ("all", 1, "all"),
        ("resumed", 3, "all"),
    ):
        state = initialize(parallel, device="cpu", seed=3)
        model = ModelConfig(path=path, dtype=dtype, log_prob_chunk=16, offload=mode or "none")
        policy, reference = (Policy.build(model, each, parallel, state) for each in (optimizer, None))
        saved = Path(root) / ("all" if name == "resumed" else name)
        store = CheckpointStore(saved, CheckpointConfig(), policy)
        if first > 1:
            assert store.load_latest() == {"round": 2}
        held = [train_round(policy, reference, number, store, sleeps=mode is not None) for number in range(first, 4)]
        found[name] = {"weights": whole_weights(policy), "bytes": held[-1]}
        shut_down(keep_world=True)
    shut_down()
    return found


def train_round(policy: Policy, reference: Policy, number: int, store: CheckpointStore, *, sleeps: bool) -> dict:
    """Rollouts, in which the weights are read as an update of the engine does; two optimizer steps; a checkpoint after round 2.

    Returns:
        bytes of weights, gradients, states and the reference while rollouts ran.
    """
    held = {}
    if sleeps:
        before = whole_weights(policy)
        for each in (policy, reference):
            each.memory.begin_rollouts()
        held = bytes_held(policy, reference)
        pushed = whole_weights(policy)
        assert pushed.keys() == before.keys() and all(torch.equal(pushed[name], before[name]) for name in pushed)
        real, offload._bytes_of = offload._bytes_of, poisoned
        for each in (policy, reference):
            each.memory.begin_training()
        offload._bytes_of = real
    scored = score(policy, prepared(policy.state), temperature=TEMPERATURE, reference=reference)
    objective = PRESETS["pmpo"]
    for _ in range(2):
        assert optimizer_step(policy, scored, objective=objective, progress=0.0, temperature=TEMPERATURE).applied
    if number == 2:
        assert store.save(2, {"round": 2}, required=True)
    return held


bytes_of = offload._bytes_of


def poisoned(storage: torch.UntypedStorage) -> torch.Tensor:
    """NaN in every number that is not written after this."""
    return bytes_of(storage).fill_(255)


def bytes_held(policy: Policy, reference: Policy) -> dict[str, int]:
    parameters = [parameter for module in policy.modules for parameter in module.parameters()]
    tensors = {
        "weights": parameters,
        "gradients": [buffer.grad_data for chunk in policy.chunks for buffer in chunk.buffers],
        "states": offload.states_of(policy.optimizer, parameters),
        "reference": [parameter for module in reference.modules for parameter in module.parameters()],
    }
    return {
        name: sum(storage.nbytes() for storage in {tensor.untyped_storage() for tensor in group})
        for name, group in tensors.items()
    }
