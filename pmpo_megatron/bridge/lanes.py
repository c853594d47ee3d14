"""Which rank hands which piece of the weights to which workers.

The ranks of a node are lanes. Workers on the trainer's own nodes take all buckets from the ranks beside them; for workers on
other nodes, rank 0's node has the lanes. A piece goes by a lane whose rank holds its shard, or a copy: of several the one with
least to carry. So each hands over its share of the bytes, nothing is gathered, and only what other pipeline stages (and
expert-parallel ranks) hold has to be brought (`source`). The workers put the shards together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from pmpo_megatron.bridge.buckets import Bucket, Piece, bucket_bytes, pieces_in, pieces_of, title
from pmpo_megatron.bridge.channel import Sender
from pmpo_megatron.bridge.fingerprint import fingerprint
from pmpo_megatron.hf.entries import Entry
from pmpo_megatron.parallel.collectives import gather_objects
from pmpo_megatron.parallel.state import ParallelState

Turn = list[tuple[int, Bucket]]  # buckets of different lanes, in whatever order they are taken


def nodes_of_ranks(state: ParallelState) -> list[int]:
    """The node of every rank, counted from 0; a node's ranks follow one another and begin with local rank 0. Collective."""
    return list(itertools.accumulate((int(local == 0) for local in gather_objects(state.local_rank, state)), initial=-1))[1:]


@dataclass(frozen=True)
class Shards:
    """Which shards a rank holds: (number, of how many) of what tensor parallelism cuts, of experts' matrices and of others."""

    expert: tuple[int, int]
    other: tuple[int, int]

    @staticmethod
    def of(state: ParallelState) -> Shards:
        return Shards(state.tensor_piece(expert=True), state.tensor_piece(expert=False))

    def of_entry(self, entry: Entry) -> tuple[int, int]:
        if entry.tensor_parallel_dim is None:
            return 0, 1
        return self.other if entry.expert is None else self.expert


class LanePlan:
    """The ways of an update's pieces.

    Args:
        entries: every parameter.
        held: what each rank holds.
        nodes: of each rank.
        places: the nodes of all workers, by what they call them.
        beside: what carries buckets works between a rank and the workers on its node; else to any, from rank 0's node.
        limit: bytes of a bucket, at most, or one row.

    Attributes:
        ranks: by the workers' node, the ranks of the lanes that lead there, as many everywhere.
        pieces: (ranks that hand it over, piece) in the order in which all ranks work on them.
        turns: the buckets in the order in which workers take them: as they are full, so that no lane waits for a bucket to be
            taken behind one that waits for that lane.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        held: Sequence[Shards],
        nodes: Sequence[int],
        places: Sequence[str],
        *,
        beside: bool,
        dtype: torch.dtype,
        limit: int,
    ) -> None:
        homes = {place: int(place) if beside else 0 for place in places}
        ranks = {place: [rank for rank, node in enumerate(nodes) if node == home] for place, home in homes.items()}
        fewest = min(map(len, ranks.values()))
        self.ranks, self._places, self._limit = {place: each[:fewest] for place, each in ranks.items()}, places, limit
        self.pieces: list[tuple[tuple[int, ...], Piece]] = []
        self.turns: list[Turn] = []
        self._under_way: list[Bucket] = [[] for _ in range(fewest)]
        carried = [0] * fewest
        first = [held[rank] for rank in self.ranks[places[0]]]
        for entry in entries:
            shards = [each.of_entry(entry) for each in first]
            for shard in range(shards[0][1]):
                lanes = [lane for lane, (number, _) in enumerate(shards) if number == shard] or range(fewest)
                for piece in pieces_of(entry, shard, shards[0][1], dtype, limit):
                    lane = min(lanes, key=carried.__getitem__)
                    self._put(piece, lane)
                    carried[lane] += bucket_bytes([piece])
        for lane in range(fewest):
            self._close(lane)

    def share(self, rank: int) -> list[Bucket]:
        """The buckets that ``rank`` hands over, in order."""
        lanes = {ranks.index(rank) for ranks in self.ranks.values() if rank in ranks}
        return [bucket for turn in self.turns for lane, bucket in turn if lane in lanes]

    def workers_of(self, rank: int) -> int:
        """How many workers take the buckets of ``rank``."""
        return sum(rank in self.ranks[place] for place in self._places)

    def _put(self, piece: Piece, lane: int) -> None:
        offset = bucket_bytes(self._under_way[lane])
        if offset and offset + bucket_bytes([piece]) > self._limit:
            self._close(lane)
            offset = 0
        placed = piece | {"offset": offset}
        self._under_way[lane].append(placed)
        self.pieces.append((tuple(ranks[lane] for ranks in self.ranks.values()), placed))

    def _close(self, lane: int) -> None:
        bucket, self._under_way[lane] = self._under_way[lane], []
        if bucket and (not self.turns or lane in (other for other, _ in self.turns[-1])):
            self.turns.append([])
        if bucket:
            self.turns[-1].append((lane, bucket))


def fill(sender: Sender, buckets: Iterable[Bucket], stream: Iterator[torch.Tensor], verify: str) -> dict[str, int]:
    """Sends ``buckets``, whose pieces come from ``stream``.

    Returns:
        their fingerprints, of mode ``verify``, by `title`.

    Raises:
        WeightSyncError: the workers do not take them.
    """
    sent: dict[str, int] = {}
    for bucket in buckets:
        first = next(stream)  # before the slot: others may need this rank for it
        memory = sender.slot()
        for (piece, target), rows in zip(pieces_in(bucket, memory), itertools.chain([first], stream), strict=False):
            sent[title(piece)] = fingerprint(rows, verify)
            target.copy_(rows)
        sender.send(bucket_bytes(bucket))
    return sent
