"""What the processes of the planner's test run: build real policies and add up what Megatron and autograd hold."""

from __future__ import annotations

import weakref
from collections import Counter
from itertools import pairwise

import numpy as np
import torch
from megatron.core.parallel_state import get_expert_data_parallel_group

from pmpo_megatron.algo.objective import PRESETS
from pmpo_megatron.data.packing import pack
from pmpo_megatron.model.layers import packed_sequences
from pmpo_megatron.model.micro_batch import prepare
from pmpo_megatron.model.optimizer import OptimizerConfig
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.model.step import optimizer_step, score
from pmpo_megatron.parallel import state as state_module
from pmpo_megatron.parallel.shards import context_indices
from pmpo_megatron.parallel.state import ParallelConfig, ParallelState, initialize, shut_down
from pmpo_megatron.types import Sample

BOUNDARIES = (0, 96, 256)
LENGTHS = (12, 20)  # of the sequences of every micro-batch in a pipeline


def measure(layouts: list[dict], cases: list[dict], activations: list[dict]) -> list[dict]:
    """For each layout and each case: what this rank holds. Cases of ``activations`` have path and recompute."""
    found = []
    for layout in layouts:
        parallel = ParallelConfig(**layout)
        state = initialize(parallel, device="cpu")
        whole = parallel.pipeline == 1 and parallel.context == 1
        counts = (2, 6) if parallel.pipeline > 1 else ()
        in_flight = {n: measure_in_flight(cases[0]["path"], parallel, state, n) for n in counts}
        found.append(
            {
                "states": [measure_state(case, parallel, state) for case in cases],
                "activations": [measure_activations(case, parallel, state) for case in activations if whole],
                "in_flight": in_flight if state.is_first_stage else {},
            }
        )
        shut_down(keep_world=True)
    shut_down()
    return found


def measure_with_many_buckets(bucket: tuple[int, int], layouts: list[dict], case: dict) -> list[dict]:
    """`measure_state` for each layout, where a gradient has buckets of `state.BUCKET` ``bucket``."""
    state_module.BUCKET = bucket
    found = []
    for layout in layouts:
        parallel = ParallelConfig(**layout)
        found.append(measure_state(case, parallel, initialize(parallel, device="cpu")))
        shut_down(keep_world=True)
    shut_down()
    return found


def measure_state(case: dict, parallel: ParallelConfig, state: ParallelState) -> dict:
    """Bytes after one optimizer step; a case has path, dtype and distributed."""
    model = ModelConfig(path=case["path"], dtype=case["dtype"])
    policy = Policy.build(model, OptimizerConfig(distributed=case["distributed"]), parallel, state)
    for chunk in policy.chunks:  # Adam allocates at the first step
        for parameter in chunk.parameters():
            parameter.main_grad.fill_(1e-3)
    policy.optimizer.step()
    return {
        "stage": state.pp_rank,
        "replica": (torch.distributed.get_rank(state.dp_cp_group), get_expert_data_parallel_group().rank()),
        "replicas": state.dp_cp_group.size(),
        "parameters_by_name": [[(name, p.numel()) for name, p in m.named_parameters()] for m in policy.modules],
        "parameters": storage_bytes(p for m in policy.modules for p in m.parameters()),
        "gradients": storage_bytes(p.main_grad for m in policy.modules for p in m.parameters()),
        "optimizer": optimizer_bytes(policy),
    }


def measure_activations(case: dict, parallel: ParallelConfig, state: ParallelState) -> int:
    """Bytes that autograd keeps after a forward pass over packed tokens, log-probs of all of them included."""
    policy = Policy.build(ModelConfig(path=case["path"], recompute=case["recompute"]), OptimizerConfig(), parallel, state)
    model = policy.modules[0]
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights and tensor.is_floating_point():
            kept.append(tensor)
        return tensor

    packed = packed_sequences(BOUNDARIES, context_size=state.cp_size, device=state.device)
    here = context_indices(BOUNDARIES, size=state.cp_size, rank=state.cp_rank)
    tokens = (torch.arange(BOUNDARIES[-1]) % 200)[here]
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(BOUNDARIES)])[here]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(tokens.unsqueeze(0), positions.unsqueeze(0), None, packed_seq_params=packed)
        output, _ = policy.score_hidden_states(hidden, tokens, torch.arange(len(tokens)), temperature=1.0, entropy=True)
    assert output.requires_grad
    return storage_bytes(kept)


def measure_in_flight(path: str, parallel: ParallelConfig, state: ParallelState, count: int) -> int:
    """Most bytes that autograd keeps at any time of an optimizer step of ``count`` equal micro-batches in a pipeline."""
    policy = Policy.build(ModelConfig(path=path), OptimizerConfig(), parallel, state)
    packed = pack([sample_of(length) for length in LENGTHS], [0.1] * len(LENGTHS), sequence_multiple=4)
    scored = score(policy, [prepare(packed, state)] * count, temperature=1.0)
    live = LiveBytes({p.untyped_storage().data_ptr() for m in policy.modules for p in m.parameters()})
    with torch.autograd.graph.saved_tensors_hooks(live.keep, lambda held: held.tensor):
        optimizer_step(policy, scored, objective=PRESETS["pmpo"], progress=0.0, temperature=1.0)
    return live.most


def sample_of(length: int) -> Sample:
    prompt, response = np.arange(4, dtype=np.int32), np.arange(length - 4, dtype=np.int32)
    return Sample(0, 0, prompt, response, np.full(len(response), -5.0, dtype=np.float32), False, 1.0)


class LiveBytes:
    """Follows what autograd keeps: adds storages as they are saved and takes them off when their graph is gone."""

    def __init__(self, excluded: set[int]) -> None:
        self.excluded, self.holders, self.now, self.most = excluded, Counter(), 0, 0

    def keep(self, tensor: torch.Tensor) -> Held:
        held, storage = Held(tensor), tensor.untyped_storage()
        if storage.data_ptr() not in self.excluded and tensor.is_floating_point():
            self._count(storage.data_ptr(), storage.nbytes(), 1)
            weakref.finalize(held, self._count, storage.data_ptr(), storage.nbytes(), -1)
        return held

    def _count(self, pointer: int, size: int, change: int) -> None:
        before = self.holders[pointer]
        self.holders[pointer] += change
        self.now += size * ((self.holders[pointer] > 0) - (before > 0))
        self.most = max(self.most, self.now)


class Held:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def storage_bytes(tensors) -> int:
    """Bytes of the memory behind ``tensors``, shared memory once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def optimizer_bytes(policy: Policy) -> int:
    """Bytes of Adam's states and of master weights: tensors that are not views of the model's own memory."""
    model = {p.untyped_storage().data_ptr() for m in policy.modules for p in m.parameters()}
    tensors = []
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        inner = part.optimizer
        tensors += [p for group in inner.param_groups for p in group["params"]]
        tensors += [v for values in inner.state.values() for v in values.values() if torch.is_tensor(v) and v.numel() > 1]
    return storage_bytes(t for t in tensors if t.untyped_storage().data_ptr() not in model)
