"""Index arithmetic of context parallelism, against its definition and against the alternative of slicing by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.parallel.shards import (
    check_boundaries,
    context_indices,
    context_order,
    context_spans,
    join_context_shards,
    sequence_multiple,
)
from pmpo_megatron.parallel.state import ParallelConfig


def test_zigzag_by_hand():
    assert context_indices((0, 8, 12), size=2, rank=0).tolist() == [0, 1, 6, 7, 8, 11]
    assert context_indices((0, 8, 12), size=2, rank=1).tolist() == [2, 3, 4, 5, 9, 10]
    assert context_spans(8, 12, size=1, rank=0) == [(8, 12)]


@given(st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_shards_partition_the_tokens_and_join_inverts(size, pieces):
    lengths = [2 * size * count for count in pieces]
    boundaries = tuple(torch.tensor([0, *lengths]).cumsum(0).tolist())
    shards = [context_indices(boundaries, size=size, rank=rank) for rank in range(size)]
    assert torch.cat(shards).sort().values.tolist() == list(range(boundaries[-1]))
    assert len({len(shard) for shard in shards}) == 1, "every rank holds equally many"
    values = torch.randn(boundaries[-1], 3)
    assert torch.equal(join_context_shards([values[shard] for shard in shards], boundaries), values)


@given(st.integers(2, 4), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_zigzag_balances_causal_attention(size, piece):
    """Sum over a rank's queries of the keys that each attends to: equal on all ranks."""
    boundaries = (0, 2 * size * piece)
    work = [int((context_indices(boundaries, size=size, rank=rank) + 1).sum()) for rank in range(size)]
    assert len(set(work)) == 1


def test_order_of_one_rank_is_the_identity():
    assert context_order((0, 5, 7), size=1).tolist() == list(range(7))


@pytest.mark.parametrize(
    "layout, multiple",
    [
        ({}, 1),
        ({"context": 2}, 4),
        ({"tensor": 2}, 1),
        ({"tensor": 2, "sequence_parallel": True}, 2),
        ({"tensor": 4, "sequence_parallel": True, "context": 2}, 16),
    ],
)
def test_sequence_multiple(layout, multiple):
    assert sequence_multiple(ParallelConfig(**layout)) == multiple


def test_a_sequence_of_the_wrong_length_is_named():
    with pytest.raises(ConfigError, match="sequence 1 has 6 tokens, not a multiple of 4"):
        check_boundaries((0, 4, 10), 4)
