"""The process groups of a run, made once and handed to everyone as one value."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from pmpo_megatron.config import Section, setting
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.parallel import liveness
from pmpo_megatron.parallel.environment import choose_device, rank_variables

BUCKET = 40_000_000, 1_000_000  # elements of a gradient at least, and for each rank that has one: as Megatron chooses


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """How the model is spread over processes. Data parallelism is what is left: world / (tensor*pipeline*context)."""

    tensor: int = setting(1, "tensor-parallel size", minimum=1)
    pipeline: int = setting(1, "pipeline-parallel size", minimum=1)
    virtual_pipeline: int | None = setting(
        None, "model chunks on each pipeline stage (interleaved schedule); null: not interleaved", minimum=2
    )
    context: int = setting(1, "context-parallel size: each sequence's tokens are split", minimum=1)
    expert: int = setting(1, "expert-parallel size: a mixture's experts are spread over so many ranks", minimum=1)
    expert_tensor: int | None = setting(None, "tensor-parallel size inside an expert; null: as tensor", minimum=1)
    sequence_parallel: bool = setting(False, "split activations outside matrix products over the tensor-parallel ranks")
    overlap_grad_reduce: bool = setting(
        False, "reduce gradients over data-parallel ranks bucket by bucket while the last backward pass goes on, not after it"
    )
    overlap_param_gather: bool = setting(
        False,
        "with overlap_grad_reduce and optimizer.distributed: gather updated parameters while the next forward pass goes on",
    )
    timeout_s: float = setting(1800.0, "longest wait in a collective before the run fails", unit="s", minimum=0.001)
    heartbeat_s: float = setting(5.0, "how often each rank says that it lives", unit="s", minimum=0.001)
    stall_s: float = setting(120.0, "a rank without a sign of life for so long is taken for dead", unit="s", minimum=0.001)

    def validate(self) -> None:
        if self.sequence_parallel and self.tensor == 1:
            raise ConfigError("sequence_parallel", "needs tensor > 1: it splits over the tensor-parallel ranks")
        if self.virtual_pipeline is not None and self.pipeline == 1:
            raise ConfigError("virtual_pipeline", f"{self.virtual_pipeline} needs pipeline > 1")
        if self.tensor % self.expert_tensor_size:
            raise ConfigError("expert_tensor", f"{self.expert_tensor} must divide tensor = {self.tensor}")
        if self.expert == 1 and self.expert_tensor_size != self.tensor:
            # Megatron-Core 0.16.1 then takes every rank's experts for copies of the same gradients: they drift apart.
            raise ConfigError(
                "expert_tensor", f"{self.expert_tensor} with tensor {self.tensor} needs expert > 1; or leave it out"
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ConfigError("overlap_param_gather", "needs overlap_grad_reduce")
        if self.heartbeat_s * 4 > self.stall_s:
            raise ConfigError("stall_s", f"{self.stall_s:g} s must be at least four heartbeats of {self.heartbeat_s:g} s")

    @property
    def model_size(self) -> int:
        """Processes that share one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def expert_tensor_size(self) -> int:
        return self.expert_tensor or self.tensor

    def reduction_bucket(self, replicas: int) -> int | None:
        """Elements of the gradient that are reduced at once over ``replicas``, data-parallel times context-parallel ranks,
        while the backward pass goes on: Megatron's own number. None: all of them, after it."""
        return max(BUCKET[0], BUCKET[1] * replicas) if self.overlap_grad_reduce and replicas > 1 else None

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model in ``world_size`` processes.

        Raises:
            ConfigError: ``world_size`` is not a multiple of tensor * pipeline * context, or experts do not fit in it.
        """
        if world_size % self.model_size:
            raise ConfigError(
                "tensor",
                f"tensor {self.tensor} * pipeline {self.pipeline} * context {self.context} = {self.model_size} "
                f"must divide the {world_size} processes",
            )
        self.expert_data_parallel_size(world_size)
        return world_size // self.model_size

    def expert_data_parallel_size(self, world_size: int) -> int:
        """Copies of an expert in ``world_size`` processes.

        Raises:
            ConfigError: ``world_size`` is not a multiple of expert * expert_tensor * pipeline.
        """
        size = self.expert * self.expert_tensor_size * self.pipeline
        if world_size % size:
            raise ConfigError(
                "expert",
                f"expert {self.expert} * expert_tensor {self.expert_tensor_size} * pipeline {self.pipeline} = {size} must "
                f"divide the {world_size} processes",
            )
        return world_size // size


@dataclass(frozen=True)
class ParallelState:
    """Who this process is. Ranks order as tensor, context, data, pipeline: tensor neighbours have adjacent ranks.

    For experts the same ranks of a pipeline stage order as expert-tensor, expert, expert-data.

    ``control_group`` spans all ranks on CPU tensors (gloo), whatever the device; ``world_group`` uses the device.
    """

    config: ParallelConfig
    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tp_size: int
    tp_rank: int
    pp_size: int
    pp_rank: int
    cp_size: int
    cp_rank: int
    dp_size: int
    dp_rank: int
    ep_size: int
    ep_rank: int
    etp_size: int
    etp_rank: int
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    etp_group: dist.ProcessGroup
    world_group: dist.ProcessGroup
    control_group: dist.ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_main(self) -> bool:
        """Whether this process owns what exists once in a run: rollouts, rewards, log."""
        return self.rank == 0

    @property
    def num_chunks(self) -> int:
        """Model chunks on this rank."""
        return self.config.virtual_pipeline or 1

    def tensor_piece(self, *, expert: bool) -> tuple[int, int]:
        """(which, of how many) piece this rank holds of a matrix that tensor parallelism cuts, an expert's or another."""
        return (self.etp_rank, self.etp_size) if expert else (self.tp_rank, self.tp_size)

    def ranks_of_replica(self, replica: int) -> list[int]:
        """The ranks whose ``dp_rank`` is ``replica``: a whole copy of the model."""
        return [rank for rank in range(self.world_size) if rank // (self.tp_size * self.cp_size) % self.dp_size == replica]

    def holds_first_stage(self, chunk: int) -> bool:
        """Whether model chunk ``chunk`` of this rank begins with the embedding."""
        return self.is_first_stage and chunk == 0

    def holds_last_stage(self, chunk: int) -> bool:
        """Whether model chunk ``chunk`` of this rank ends with the output layer."""
        return self.is_last_stage and chunk == self.num_chunks - 1

    def describe(self) -> str:
        """One line for logs: layout and device."""
        interleaved = f" x{self.config.virtual_pipeline} interleaved" if self.config.virtual_pipeline else ""
        sequence = "+SP" if self.config.sequence_parallel else ""
        experts = f" EP{self.ep_size} ETP{self.etp_size}" if self.ep_size > 1 else ""
        return (
            f"{self.world_size} processes on {self.device.type}: TP{self.tp_size}{sequence} PP{self.pp_size}"
            f"{interleaved} CP{self.cp_size} DP{self.dp_size}{experts}"
        )


def initialize(config: ParallelConfig, *, device: str | None = None, seed: int = 0) -> ParallelState:
    """Joins the run's processes (torchrun's environment variables) and makes every group.

    Args:
        config: the layout.
        device: ``cpu`` or ``cuda``; None (or ``auto``) takes the GPU where there is one.
        seed: of Megatron's random states; each tensor-parallel rank derives its own.

    Raises:
        ConfigError: torchrun's variables are missing, the layout does not fit the number of processes, or the device
            does not fit the machine.
    """
    rank, world_size, local_rank = rank_variables()
    config.data_parallel_size(world_size)
    chosen = choose_device(device, local_rank)
    timeout = timedelta(seconds=config.timeout_s)
    if not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        store = dist.HashStore() if world_size == 1 else None  # PyTorch's own listens on every interface
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    control_group = dist.new_group(backend="gloo", timeout=timeout) if chosen.type == "cuda" else _world_group()
    liveness.start_watch(rank=rank, world_size=world_size, heartbeat_s=config.heartbeat_s, stall_s=config.stall_s)
    _initialize_megatron(config, seed)
    return _read_state(config, rank, world_size, local_rank, chosen, control_group)


def shut_down(*, keep_world: bool = False) -> None:
    """Destroys the groups; with ``keep_world`` the processes stay connected and may `initialize` another layout."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized() and not keep_world:
        liveness.stop_watch()
        dist.destroy_process_group()


def _initialize_megatron(config: ParallelConfig, seed: int) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor_size,
        distributed_timeout_minutes=config.timeout_s / 60,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def _world_group() -> dist.ProcessGroup:
    """The group of all ranks, which `initialize` made."""
    group = dist.group.WORLD
    assert group is not None
    return group


def _read_state(
    config: ParallelConfig,
    rank: int,
    world_size: int,
    local_rank: int,
    device: torch.device,
    control_group: dist.ProcessGroup,
) -> ParallelState:
    from megatron.core import parallel_state as ps

    tp, pp = ps.get_tensor_model_parallel_group(), ps.get_pipeline_model_parallel_group()
    cp = ps.get_context_parallel_group()
    dp, dp_cp = ps.get_data_parallel_group(), ps.get_data_parallel_group(with_context_parallel=True)
    ep, etp = ps.get_expert_model_parallel_group(), ps.get_expert_tensor_parallel_group()
    return ParallelState(
        config=config,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        device=device,
        tp_size=tp.size(),
        tp_rank=tp.rank(),
        pp_size=pp.size(),
        pp_rank=pp.rank(),
        cp_size=cp.size(),
        cp_rank=cp.rank(),
        dp_size=dp.size(),
        dp_rank=dp.rank(),
        ep_size=ep.size(),
        ep_rank=ep.rank(),
        etp_size=etp.size(),
        etp_rank=etp.rank(),
        tp_group=tp,
        cp_group=cp,
        dp_group=dp,
        dp_cp_group=dp_cp,
        pp_group=pp,
        ep_group=ep,
        etp_group=etp,
        world_group=_world_group(),
        control_group=control_group,
    )
