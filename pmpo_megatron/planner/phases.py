"""Memory that trainer and engines share by turns, and what moving it costs.

While rollouts run gradients are freed, and what `model.offload` says is in the host's memory; while the trainer trains engines
have freed what `rollout.sleep` says. Freeing and taking again counts as nothing, a copy as its bytes at the rate to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pmpo_megatron.planner.activations import ActivationBytes
from pmpo_megatron.planner.engine import EngineBytes
from pmpo_megatron.planner.hardware import Hardware
from pmpo_megatron.planner.memory import GpuMemory
from pmpo_megatron.planner.parameters import StateBytes
from pmpo_megatron.training.run_config import RunConfig


@dataclass(frozen=True)
class Moved:
    """Bytes that the GPU with most of them sends to the host before rollouts, and takes back afterwards."""

    weights: int
    states: int

    @staticmethod
    def of(config: RunConfig, gpus: Sequence[GpuMemory]) -> Moved:
        """``gpus``: as they train."""
        weights = max(gpu.state.parameters + gpu.reference for gpu in gpus) if config.model.offload == "all" else 0
        states = max(gpu.state.optimizer for gpu in gpus) if config.model.offload != "none" else 0
        return Moved(weights, states)

    @property
    def total(self) -> int:
        return self.weights + self.states

    def seconds(self, hardware: Hardware, scoring: float) -> float:
        """States come back while ``scoring`` runs. Weights are read once more, for the update of the engine."""
        waited = max(0.0, self.states / hardware.host_link_bytes_per_s - scoring)
        return (self.total + 2 * self.weights) / hardware.host_link_bytes_per_s + waited


def by_phase(gpu: GpuMemory, config: RunConfig, engine: EngineBytes | None) -> list[GpuMemory]:
    """``gpu``, on which everything is at once, as it trains, and as it is while rollouts run."""
    if engine is None or (config.rollout.sleep == "none" and config.model.offload == "none"):
        return [gpu]
    held = engine.held(config.rollout.sleep) if gpu.shared else 0.0
    training = replace(gpu, phase="training", engine=held, engine_asks=0.0)
    if not gpu.shared:
        return [training]
    state = StateBytes(
        parameters=0 if config.model.offload == "all" else gpu.state.parameters,
        gradients=0,
        optimizer=gpu.state.optimizer if config.model.offload == "none" else 0,
    )
    return [
        training,
        replace(
            gpu,
            phase="rollouts",
            state=state,
            reference=0 if config.model.offload == "all" else gpu.reference,
            activations=ActivationBytes(0.0, 0.0, 0.0),
            checkpoint=0.0,
        ),
    ]
