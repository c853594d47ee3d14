"""Memory of every kind of GPU in a run: pipeline stages differ, and some of the nodes' first ones hold rollout engines."""

from __future__ import annotations

from dataclasses import dataclass

from pmpo_megatron.parallel.state import ParallelConfig
from pmpo_megatron.planner.activations import ActivationBytes
from pmpo_megatron.planner.hardware import Hardware
from pmpo_megatron.planner.parameters import StateBytes
from pmpo_megatron.units import GIB

COLUMNS = ("weights", "gradients", "optimizer", "reference", "activations", "log-probs", "vLLM", "reserved", "total")


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on the fullest GPU of a pipeline stage, without or with the rollout engine on it.

    Attributes:
        shared: an engine is on it.
        state: exact: what Megatron allocates.
        reference: weights of the reference model; exact.
        activations: estimated.
        engine: of vLLM, 0 on GPUs without it.
        engine_asks: what vLLM wants to find free when it starts.
        checkpoint: taken while one is loaded, when there are no activations.
        phase: when it is so (`phases`); empty: always.
    """

    stage: int
    shared: bool
    state: StateBytes
    reference: int
    activations: ActivationBytes
    engine: float
    engine_asks: float
    checkpoint: float
    hardware: Hardware
    phase: str = ""

    @property
    def reserved(self) -> float:
        """CUDA contexts, NCCL, and what is lost between activations."""
        contexts = self.hardware.reserved_gib + (self.hardware.engine_context_gib if self.shared else 0.0)
        return contexts * GIB + self.hardware.fragmentation * self.activations.total

    @property
    def certain(self) -> float:
        """What is taken whatever the activations are."""
        return self.state.total + self.reference + self.engine

    @property
    def total(self) -> float:
        return self.certain + max(self.activations.total, self.checkpoint) + self.reserved

    @property
    def spare(self) -> float:
        return self.hardware.memory_gib * GIB - self.total

    def row(self) -> list[str]:
        """The parts in GiB, in the order of `COLUMNS`; log-probs are what they add to the peak."""
        layers = self.activations.kept + self.activations.working
        parts = (self.state.parameters, self.state.gradients, self.state.optimizer, self.reference, layers)
        rest = (self.activations.total - layers, self.engine, self.reserved, self.total)
        return [f"{part / GIB:.1f}" for part in (*parts, *rest)]

    @property
    def name(self) -> str:
        phase = f", {self.phase}" if self.phase else ""
        return f"stage {self.stage}{' with vLLM' if self.shared else ''}{phase}"

    def largest(self) -> str:
        """The part that takes most of this GPU."""
        parts = {
            "weights, gradients and optimizer": self.state.total + self.reference,
            "activations": self.activations.total,
            "vLLM": self.engine,
        }
        return max(parts, key=parts.__getitem__)


def kinds_of_gpu(
    parallel: ParallelConfig, *, world_size: int, engine_size: int, node_size: int | None = None
) -> list[tuple[int, bool]]:
    """(pipeline stage, whether the rollout engine is on it) for every kind of GPU in the run.

    Ranks order as tensor, context, data, pipeline, so stage s holds ranks s * n .. (s + 1) * n - 1 with n = world / P.

    Args:
        engine_size: how many GPUs of rank 0's host, from the first on, hold engines.
        node_size: and those of every other node of so many GPUs; None: of no other.
    """
    ranks = world_size // parallel.pipeline
    kinds = []
    for stage in range(parallel.pipeline):
        numbers = range(stage * ranks, (stage + 1) * ranks)
        shared = sum((number % node_size if node_size else number) < engine_size for number in numbers)
        kinds += [(stage, True)] * (shared > 0) + [(stage, False)] * (shared < ranks)
    return kinds
