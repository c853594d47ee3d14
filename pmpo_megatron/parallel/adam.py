"""Adam with the state layout that Megatron's distributed optimizer expects, for where neither Transformer Engine nor apex is.

Megatron-Core falls back to ``torch.optim.AdamW`` there, whose ``step`` is part of each parameter's state. A distributed
optimizer's checkpoint cannot be loaded into a fresh one then (0.16.1, distrib_optimizer.py: load_state_dict wants ``step``
in the parameter group, as apex and Transformer Engine have it). `install_adam` puts `GroupStepAdam` where apex's
FusedAdam would be. Delete this file when Megatron-Core loads the checkpoints of its own fallback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW with the interface of apex's FusedAdam: ``step`` in the group, exp_avg and exp_avg_sq per tensor."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **ignored: Any,
    ) -> None:
        self.update = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        if closure is not None:
            raise TypeError("no closure: Megatron computes the gradients before it asks for a step")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            group["step"] = int(group.get("step", 0)) + 1
            if not params:
                continue
            states = [self._state_of(p) for p in params]
            steps = [torch.tensor(float(group["step"]), device=params[0].device)] * len(params)
            # The fused kernels add 1 to each step tensor only outside of this call (torch/optim/adamw.py): we have done so.
            self.update(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def _state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def install_adam() -> bool:
    """Makes Megatron-Core use `GroupStepAdam` unless it found apex or Transformer Engine. Idempotent; whether it is on."""
    import megatron.core.optimizer as factory
    import megatron.core.optimizer.distrib_optimizer as distributed

    if not factory.USING_PYTORCH_OPTIMIZER and factory.Adam is not GroupStepAdam:
        return False
    factory.Adam, factory.USING_PYTORCH_OPTIMIZER = GroupStepAdam, False
    distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_APEX_OPTIMIZER = GroupStepAdam, True, True
    return True
