"""What the processes of the planner's test run: build real policies and add up what Megatron allocated."""

from __future__ import annotations

import torch

from pmpo_megatron.model.optimizer import OptimizerConfig
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.parallel.state import ParallelConfig, ParallelState, initialize, shut_down


def measure(layout: dict, cases: list[dict]) -> list[dict]:
    """For each case (path, dtype, distributed): bytes on this rank after one optimizer step."""
    parallel = ParallelConfig(**layout)
    state = initialize(parallel, device="cpu")
    results = [measure_case(case, parallel, state) for case in cases]
    shut_down()
    return results


def measure_case(case: dict, parallel: ParallelConfig, state: ParallelState) -> dict:
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
