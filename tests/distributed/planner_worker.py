"""What the processes of the planner's test run: build real policies and add up what Megatron and autograd hold."""

from __future__ import annotations

import torch

from pmpo_megatron.model.inputs import packed_sequences
from pmpo_megatron.model.optimizer import OptimizerConfig
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.parallel.shards import context_indices
from pmpo_megatron.parallel.state import ParallelConfig, ParallelState, initialize, shut_down

TOKENS, BOUNDARIES = 256, (0, 128, 256)


def measure(layouts: list[dict], cases: list[dict], activations: list[dict]) -> list[dict]:
    """For each layout and each case: what this rank holds. Cases of ``activations`` have path and recompute."""
    found = []
    for layout in layouts:
        parallel = ParallelConfig(**layout)
        state = initialize(parallel, device="cpu")
        whole = parallel.pipeline == 1 and parallel.context == 1
        found.append(
            {
                "states": [measure_state(case, parallel, state) for case in cases],
                "activations": [measure_activations(case, parallel, state) for case in activations if whole],
            }
        )
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
        "replica": torch.distributed.get_rank(state.dp_cp_group),
        "replicas": state.dp_cp_size,
        "parameters_by_name": [[(name, p.numel()) for name, p in m.named_parameters()] for m in policy.modules],
        "parameters": storage_bytes(p for m in policy.modules for p in m.parameters()),
        "gradients": storage_bytes(p.main_grad for m in policy.modules for p in m.parameters()),
        "optimizer": optimizer_bytes(policy),
    }


def measure_activations(case: dict, parallel: ParallelConfig, state: ParallelState) -> int:
    """Bytes that autograd keeps after a forward pass over `TOKENS` packed tokens, log-probs of all of them included."""
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
    tokens = (torch.arange(TOKENS) % 200)[here]
    policy.head.ask(tokens, torch.arange(len(tokens)), temperature=1.0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(tokens.unsqueeze(0), (torch.arange(TOKENS) % 128)[here].unsqueeze(0), None, packed_seq_params=packed)
    assert output.requires_grad
    return storage_bytes(kept)


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
