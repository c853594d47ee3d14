"""The optimizer (Megatron's, distributed or not), the learning-rate schedule, and the update itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pmpo_megatron.config import Section, setting
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.parallel.adam import install_adam


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW and how its learning rate moves."""

    learning_rate: float = setting(1e-6, "peak learning rate", above=0.0)
    schedule: str = setting("constant", "after warm-up", choices=("constant", "linear", "cosine"))
    warmup_steps: int = setting(0, "linear warm-up; its first step is not 0", unit="optimizer steps", minimum=0)
    decay_steps: int | None = setting(None, "linear, cosine: when min_learning_rate is reached", unit="optimizer steps")
    min_learning_rate: float = setting(0.0, "linear, cosine: last learning rate", minimum=0.0)
    weight_decay: float = setting(0.0, "decoupled decay of matrices; never of norms and biases", minimum=0.0)
    beta1: float = setting(0.9, "Adam's beta1", minimum=0.0, maximum=0.999999)
    beta2: float = setting(0.95, "Adam's beta2", minimum=0.0, maximum=0.999999)
    epsilon: float = setting(1e-8, "Adam's epsilon", minimum=1e-30)
    clip_grad: float = setting(1.0, "largest norm of the whole gradient; 0: no limit", minimum=0.0)
    distributed: bool = setting(True, "shard optimizer states over the data-parallel ranks")

    def validate(self) -> None:
        decays = self.schedule != "constant"
        if decays and (self.decay_steps or 0) <= self.warmup_steps:
            raise ConfigError(
                "decay_steps",
                f"{self.decay_steps} must be above warmup_steps = {self.warmup_steps} for schedule {self.schedule!r}",
            )
        if not decays and self.decay_steps is not None:
            raise ConfigError("decay_steps", "has no effect with schedule 'constant'; use 'linear' or 'cosine'")
        if self.min_learning_rate > self.learning_rate:
            raise ConfigError("min_learning_rate", f"{self.min_learning_rate} is above the peak {self.learning_rate}")


def learning_rate_at(step: int, config: OptimizerConfig) -> float:
    """Learning rate of update number ``step``, counted from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant" or config.decay_steps is None:
        return config.learning_rate
    share = min(1.0, (step - config.warmup_steps) / (config.decay_steps - config.warmup_steps))
    height = 1 - share if config.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
    return config.min_learning_rate + height * (config.learning_rate - config.min_learning_rate)


class LearningRateSchedule:
    """Sets learning rate and weight decay of the optimizer's groups; its state is the number of updates made."""

    def __init__(self, optimizer: Any, config: OptimizerConfig) -> None:
        self.optimizer, self.config, self.num_updates = optimizer, config, 0
        self._apply()

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return learning_rate_at(self.num_updates, self.config)

    def advance(self) -> None:
        self.num_updates += 1
        self._apply()

    def state_dict(self) -> dict[str, int]:
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_updates = int(state["num_updates"])
        self._apply()

    def _apply(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
            group["weight_decay"] = self.config.weight_decay * group.get("wd_mult", 1.0)


def make_optimizer(chunks: Sequence[torch.nn.Module], config: OptimizerConfig) -> Any:
    """Megatron's optimizer over DDP-wrapped ``chunks``: float32 master weights where the parameters are bf16."""
    from megatron.core.optimizer import OptimizerConfig as MegatronConfig
    from megatron.core.optimizer import get_megatron_optimizer

    install_adam()
    dtype = next(chunks[0].parameters()).dtype
    settings = MegatronConfig(
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=config.min_learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.epsilon,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.distributed,
    )
    return get_megatron_optimizer(settings, list(chunks))


def parts_of(optimizer: Any) -> list[Any]:
    """Megatron's optimizers inside ``optimizer``: experts spread over expert-parallel ranks have one of their own."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def apply_gradients(optimizer: Any, config: OptimizerConfig) -> tuple[float, bool]:
    """Clips by the global norm and updates; a gradient with NaN or inf updates nothing.

    The same parts as Megatron's ``optimizer.step()``, which without a loss scaler would apply non-finite gradients.

    Returns:
        norm of the whole gradient before clipping, equal on every rank; whether the update was made.
    """
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm, False
    for part in parts_of(optimizer):
        parameters = part.get_parameters()
        if config.clip_grad > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, config.clip_grad, norm)
    optimizer.step_with_ready_grads()
    return norm, True
