"""Pieces of Megatron's shards on the ranks that hand them to workers, one piece in memory at a time.

Such a rank has most of what it hands over. The rest takes at most three steps, each inside one of the trainer's own groups and
for every copy of the model at once: from the pipeline stage that owns it to the same place in other stages; of an expert, from
the expert-parallel rank that holds it; and between tensor-parallel ranks, if a group reaches over nodes. So no link carries
more with more nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
import torch.distributed as dist

from pmpo_megatron.bridge.buckets import Piece, title
from pmpo_megatron.hf.mapping import local_name
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.parallel.collectives import gather_objects
from pmpo_megatron.parallel.liveness import naming_ranks

CPU = torch.device("cpu")


class WeightSource:
    """Streams a policy's weights.

    Args:
        device: of the tensors that come out: the policy's own, or the CPU.

    Attributes:
        received_bytes: that other ranks sent to this one, so far.
    """

    def __init__(self, policy: Policy, device: torch.device = CPU) -> None:
        self._policy, self.state, self.device, self.received_bytes = policy, policy.state, device, 0
        self.entries = {entry.megatron: entry for entry in policy.mapping.entries}
        self.parameters = {local_name(name): parameter for name, parameter in policy.named_parameters()}
        state = self.state
        self._groups = {"pp": state.pp_group, "ep": state.ep_group, "tp": state.tp_group, "etp": state.etp_group}
        mine = {axis: dist.get_process_group_ranks(group) for axis, group in self._groups.items()}
        known = gather_objects((mine, list(self.parameters)), state)
        self._members = {axis: [members[axis] for members, _ in known] for axis in self._groups}  # of each rank's group
        self._owner = {name: rank for rank in reversed(range(len(known))) for name in known[rank][1]}  # the first one

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.parameters.values())).dtype

    def stream(self, pieces: Iterable[tuple[Collection[int], Piece]]) -> Iterator[torch.Tensor]:
        """Each of ``pieces`` on ``device``, on the ranks that take it. Collective: every rank iterates, in step."""
        self._policy.gather.finish()
        for takers, piece in pieces:
            rows = self._bring(piece, set(takers))
            if self.state.rank in takers:
                assert rows is not None, f"{title(piece)} did not come to rank {self.state.rank}"
                yield rows.to(self.device)

    def _bring(self, piece: Piece, need: set[int]) -> torch.Tensor | None:
        """The rows of ``piece`` where this rank is in ``need``, or passes them on."""
        owner, expert = self._owner[piece["name"]], self.entries[piece["name"]].expert is not None
        places = {axis: self._members[axis][owner].index(owner) for axis in (("pp", "ep") if expert else ("pp",))}
        if piece["shards"] > 1:
            places["etp" if expert else "tp"] = piece["shard"]
        steps = []
        for axis, place in reversed(places.items()):  # the last step first: who needs what before it
            steps.append((axis, place, need))
            need = {self._members[axis][rank][place] for rank in need}
        rows = None
        if self.state.rank in need:
            rows = self._policy.memory.weight(self.parameters[piece["name"]], piece["start"], piece["shape"][0])
        for axis, place, need in reversed(steps):
            rows = self._pass_on(piece, rows, axis, place, need)
        return rows

    def _pass_on(
        self, piece: Piece, rows: torch.Tensor | None, axis: str, place: int, need: Collection[int]
    ) -> torch.Tensor | None:
        """``rows`` of the rank at ``place`` in each group of ``axis``, for the group's ranks that ``need`` them."""
        members, group = self._members[axis][self.state.rank], self._groups[axis]
        source = members[place]
        wanting = [rank for rank in members if rank in need and rank != source]
        if not wanting or self.state.rank not in (source, *wanting):
            return rows
        if self.state.rank != source:
            rows = torch.empty(piece["shape"], dtype=self.dtype, device=self.state.device)
            self.received_bytes += rows.nbytes
        assert rows is not None, f"{title(piece)} is not on rank {source}"
        with naming_ranks(f"bringing {piece['name']}"):
            if len(wanting) == len(members) - 1:
                dist.broadcast(rows.contiguous(), source, group=group)
            elif self.state.rank != source:
                dist.recv(rows, source, group=group)
            else:
                for rank in wanting:
                    dist.send(rows.contiguous(), rank, group=group)
        return rows


def give_back_cache(device: torch.device) -> None:
    """Frees what PyTorch keeps of this rank's GPU for later: an engine that starts there again wants its share free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
