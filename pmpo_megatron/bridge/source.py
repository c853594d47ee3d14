"""Megatron's shards as a stream of whole Hugging Face tensors on rank 0, one parameter in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from pmpo_megatron.hf.entries import Entry
from pmpo_megatron.hf.mapping import local_name
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.parallel.collectives import gather_objects, gather_tensor
from pmpo_megatron.parallel.liveness import naming_ranks

CPU = torch.device("cpu")


class WeightSource:
    """Streams a policy's weights. Collective: every rank iterates, in step.

    Each parameter is gathered over its tensor-parallel group on the pipeline stage that owns it, by the first data- and
    context-parallel replica, and sent to rank 0. An expert is gathered over its expert-tensor-parallel group, by the first of
    the ranks with copies of it, wherever it lies.

    Args:
        device: of the tensors on rank 0: the policy's own, or the CPU.
        rounding: of matrices, see `round_matrix`.
    """

    def __init__(self, policy: Policy, device: torch.device = CPU, rounding: str = "none") -> None:
        self.policy, self.state, self.device, self.rounding = policy, policy.state, device, rounding
        self.parameters = {local_name(name): parameter for name, parameter in policy.named_parameters()}
        entries = policy.mapping.entries
        piece = {expert: self.state.tensor_piece(expert=expert)[0] for expert in (False, True)}
        mine = {entry.megatron for entry in entries if self._gathers(entry) and piece[entry.expert is not None] == 0}
        ranks = gather_objects(mine, self.state)
        # The global rank that holds tensor-parallel piece 0 of each parameter, in the first replica.
        self.owner = {e.megatron: next(r for r, names in enumerate(ranks) if e.megatron in names) for e in entries}

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.parameters.values())).dtype

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor on ``device``) on rank 0; nothing on other ranks, which take part until the end all the same."""
        self.policy.gather.finish()
        for entry in self.policy.mapping.entries:
            owner = self.owner[entry.megatron]
            whole = None
            if self._gathers(entry):
                shard = self.policy.memory.weight(self.parameters[entry.megatron])
                group = self.state.tp_group if entry.expert is None else self.state.etp_group
                pieces = [shard] if entry.tensor_parallel_dim is None else gather_tensor(shard, group)
                if self.state.rank == owner:
                    whole = entry.unshard(pieces).to(self.device)
            if owner != 0:
                whole = self._send_to_main(entry, whole, owner)
            if self.state.rank == 0 and whole is not None:
                tensors = (round_matrix(tensor, self.rounding) for tensor in entry.split(whole))
                yield from zip(entry.hf, tensors, strict=True)

    def _gathers(self, entry: Entry) -> bool:
        """Whether this rank is one of those that put ``entry`` together: it holds a piece of it, in the first replica."""
        first = self.state.dp_rank == self.state.cp_rank == 0 if entry.expert is None else self.state.edp_rank == 0
        return first and entry.megatron in self.parameters

    def _send_to_main(self, entry: Entry, whole: torch.Tensor | None, owner: int) -> torch.Tensor | None:
        """What rank 0 gets of ``owner``, which holds ``whole``; on other ranks what they were given."""
        group = self.state.control_group if self.device.type == "cpu" else self.state.world_group
        with naming_ranks(f"sending {entry.megatron} to rank 0"):
            if whole is not None:
                dist.send(whole.contiguous(), 0, group=group)
            elif self.state.rank == 0:
                whole = torch.empty(entry.full_shape, dtype=self.dtype, device=self.device)
                dist.recv(whole, owner, group=group)
        return whole


def round_matrix(tensor: torch.Tensor, rounding: str) -> torch.Tensor:
    """``tensor`` in its own type with values that ``rounding`` (none, bf16, fp8) can hold; vectors stay as they are.

    fp8 is e4m3, its largest value, 448, at the tensor's largest.
    """
    if rounding == "none" or tensor.dim() < 2:
        return tensor
    if rounding == "bf16":
        return tensor.bfloat16().to(tensor.dtype)
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = (tensor.abs().amax().float() / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return ((tensor.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(tensor.dtype)


def give_back_cache(device: torch.device) -> None:
    """Frees what PyTorch keeps of this rank's GPU for later: an engine that starts there again wants its share free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
