"""Memory that saving and loading a checkpoint take beside training's: of a node, and of a GPU.

By what `checkpoint.save` and `checkpoint.optimizer_state` have Megatron do (megatron-core 0.16.1 and 0.19.2,
optimizer/distrib_optimizer.py, `get_parameter_state_dp_zero`). With B elements in a model chunk's buffer and d data-parallel
ranks, saving copies 12 B / d bytes of states to the host on every rank; the first data-parallel rank has room for 12 B, and
meanwhile receives one state in 4 B bytes, which gloo holds once more; then it copies the weights. Spread experts have buffers,
and first ranks, of their own. Loading makes room on every
rank for the states of the parameters of which it owns a part, and puts gate and up projections, which are stored apart,
together again: those of the states on the host, those of the weights on the GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from pmpo_megatron.hf.shape import ModelShape
from pmpo_megatron.parallel.state import ParallelConfig
from pmpo_megatron.planner.parameters import Buffer, Parameter, chunk_buffers
from pmpo_megatron.units import ITEM_SIZE

STATES = 12  # bytes of a parameter's float32 copy and of Adam's two moments
PROJECTION = "linear_fc1.weight"  # gate and up in one


@dataclass(frozen=True)
class CheckpointBytes:
    """Most bytes at once: of the fullest node while a checkpoint is saved and loaded, and of a GPU while it is loaded."""

    saving: float
    loading: float
    gpu: float


@functools.lru_cache(maxsize=4096)
def checkpoint_bytes_of_node(
    shape: ModelShape, parallel: ParallelConfig, *, world_size: int, node_size: int, dtype: str, distributed: bool
) -> CheckpointBytes:
    """Beside what training itself holds. Ranks order as tensor, context, data, pipeline.

    Args:
        node_size: processes of a node.
        dtype: of the weights.
        distributed: the optimizer's states are sharded; else they are saved from the GPU, and loaded into it.
    """
    stages = [
        _Stage.of(shape, parallel, stage, world_size, ITEM_SIZE[dtype], distributed) for stage in range(parallel.pipeline)
    ]
    ranks = world_size // parallel.pipeline
    saving, loading = [], []
    for first in range(0, world_size, node_size):
        node = range(first, min(first + node_size, world_size))
        saving.append(sum(stages[r // ranks].saving(r % ranks) for r in node))
        loading.append(sum(stages[r // ranks].loading for r in node))
    return CheckpointBytes(max(saving), max(loading), max(stage.gpu for stage in stages))


@dataclass(frozen=True)
class _Stage:
    """Bytes on one rank of a pipeline stage."""

    copied: float  # to the host while saving, on every rank
    gathered: tuple[tuple[int, float], ...]  # more of it on so many first ranks: those of the first replica
    loading: float
    gpu: float

    @staticmethod
    def of(shape: ModelShape, parallel: ParallelConfig, stage: int, world_size: int, item: int, distributed: bool) -> _Stage:
        replicas = world_size // (parallel.tensor * parallel.pipeline)
        buffers = [
            part
            for n in range(parallel.virtual_pipeline or 1)
            for part in chunk_buffers(shape, parallel, stage=stage, chunk=n, replicas=replicas)
        ]
        projections = sum(p.numel for parameters, _, _ in buffers for p in parameters if p.name.endswith(PROJECTION))
        firsts = (parallel.tensor, False), (parallel.expert * parallel.expert_tensor_size, True)
        sizes: dict[bool, list[int]] = {False: [], True: []}
        for parameters, _, _ in buffers:
            sizes[parameters[0].spread].append(sum(p.numel for p in parameters))
        gathered: tuple[tuple[int, float], ...]
        if not distributed:
            whole = tuple((count, (STATES + item) * float(sum(sizes[spread]))) for count, spread in firsts)
            return _Stage(0.0, whole, 0.0, (STATES + item) * projections)
        copied = STATES * max(buffer.numel / ranks for _, buffer, ranks in buffers)
        gathered = tuple((count, _gathered(sizes[spread], item)) for count, spread in firsts)
        loading = STATES * sum(_most_read(*part) for part in buffers)
        return _Stage(copied, gathered, loading, item * projections)

    def saving(self, rank: int) -> float:
        """On the stage's rank number ``rank``."""
        return self.copied + sum(amount for count, amount in self.gathered if rank < count)


def _gathered(sizes: list[int], item: int) -> float:
    """Bytes on a rank of the first replica, for buffers with ``sizes`` elements of parameters."""
    return max(STATES * sum(sizes) + 8 * max(sizes, default=0), (STATES + item) * sum(sizes))


def _most_read(parameters: list[Parameter], buffer: Buffer, replicas: int) -> int:
    """Elements for which the rank that reads most has room: whole parameters, projections twice."""
    read = [0] * replicas
    for parameter, (start, end) in zip(reversed(parameters), buffer.ranges, strict=True):
        held = parameter.numel * (2 if parameter.name.endswith(PROJECTION) else 1)
        first, last = next(bucket for bucket in buffer.buckets if bucket[0] <= start < bucket[1])
        share = (last - first) // replicas
        for rank in range((start - first) // share, (end - 1 - first) // share + 1):
            read[rank] += held
    return max(read)
