"""Which tokens of a packed micro-batch a rank holds: index arithmetic only, no process groups.

Shape suffixes: T packed tokens of a micro-batch, L those of them that one context-parallel rank holds.

Under context parallelism of size C every sequence of length n (a multiple of 2C) is cut into 2C equal pieces; rank r
holds pieces r and 2C-1-r ("zig-zag"), so that causal attention costs every rank the same. Megatron's rotary embedding
and Transformer Engine assume exactly this layout. Sequence parallelism then gives tensor-parallel rank k the k-th of
equal contiguous parts of the L tokens; only activations inside Megatron are split that way, never our inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.parallel.state import ParallelConfig


def sequence_multiple(parallel: ParallelConfig) -> int:
    """Every packed sequence's length must be a multiple of this."""
    pieces = 2 * parallel.context if parallel.context > 1 else 1
    return pieces * (parallel.tensor if parallel.sequence_parallel else 1)


def check_boundaries(boundaries: Sequence[int], multiple: int) -> None:
    """Raises ConfigError unless every sequence between ``boundaries`` has a length that ``multiple`` divides."""
    for index, (start, end) in enumerate(zip(boundaries[:-1], boundaries[1:], strict=True)):
        if (end - start) % multiple:
            raise ConfigError(
                "cu_seqlens",
                f"sequence {index} has {end - start} tokens, not a multiple of {multiple}; "
                "pack with sequence_multiple(parallel)",
            )


def context_spans(start: int, end: int, *, size: int, rank: int) -> list[tuple[int, int]]:
    """The one or two [start, end) ranges of global positions of one sequence that context-parallel ``rank`` holds."""
    if size == 1:
        return [(start, end)]
    piece = (end - start) // (2 * size)
    first, second = start + rank * piece, start + (2 * size - 1 - rank) * piece
    return [(first, first + piece), (second, second + piece)]


def context_indices(boundaries: Sequence[int], *, size: int, rank: int) -> torch.Tensor:
    """int64 [L]: global positions of the tokens that context-parallel ``rank`` holds, in the order it holds them."""
    spans = [
        span
        for start, end in zip(boundaries[:-1], boundaries[1:], strict=True)
        for span in context_spans(start, end, size=size, rank=rank)
    ]
    return torch.cat([torch.arange(*span) for span in spans]) if spans else torch.empty(0, dtype=torch.int64)


def context_order(boundaries: Sequence[int], *, size: int) -> torch.Tensor:
    """int64 [T]: where each global position lies after concatenating the ranks' shards in rank order."""
    gathered = torch.cat([context_indices(boundaries, size=size, rank=rank) for rank in range(size)])
    order = torch.empty_like(gathered)
    order[gathered] = torch.arange(gathered.numel())
    return order


def join_context_shards(shards_L: Sequence[torch.Tensor], boundaries: Sequence[int]) -> torch.Tensor:
    """[T, ...] from every rank's [L, ...], in rank order: the inverse of taking ``context_indices``."""
    if len(shards_L) == 1:
        return shards_L[0]
    order = context_order(boundaries, size=len(shards_L))
    return torch.cat(list(shards_L)).index_select(0, order.to(shards_L[0].device))
