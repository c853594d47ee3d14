"""Pieces of weights come to the ranks that hand them over: together the checkpoint on every layout, and to none all of it."""

import pytest
import torch
from safetensors.torch import load_file

from pmpo_megatron.bridge.buckets import Assembly, check_complete, title
from pmpo_megatron.hf.mapping import WeightMapping
from pmpo_megatron.hf.shape import read_shape
from tests.distributed.harness import run_ranks
from tests.tiny_models import save_tiny_model

DENSE = {
    "dp4": {},
    "tp4": dict(tensor=4, sequence_parallel=True),
    "pp4": dict(pipeline=4),
    "tp2-pp2": dict(tensor=2, pipeline=2),
    "cp2-pp2-interleaved": dict(context=2, pipeline=2, virtual_pipeline=2),
}
MIXTURE = {
    "dp4-ep4": dict(expert=4),
    "tp2-ep2-etp1": dict(tensor=2, sequence_parallel=True, expert=2, expert_tensor=1),
    "tp2-ep2": dict(tensor=2, sequence_parallel=True, expert=2),
    "tp4-ep2-etp2": dict(tensor=4, sequence_parallel=True, expert=2, expert_tensor=2),
    "pp2-ep2": dict(pipeline=2, expert=2),
}
PLACES = {  # see `lanes_worker.take_shares`; and which ranks have the lanes
    "one node": (4, ["0"], True, [[0, 1, 2, 3]]),
    "two nodes": (2, ["0", "0", "1", "1"], True, [[0, 1], [2, 3]]),
    "the first of two nodes": (2, ["0"], True, [[0, 1]]),
    "nodes of their own": (2, ["own"], False, [[0, 1]]),
}
HAS_ALL = [("dp4", place) for place in PLACES] + [("tp4", "one node")]


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    """{layout: (checkpoint, what each rank has there)}."""
    found = {}
    for kind, layouts in (("qwen2-tied", DENSE), ("qwen2-moe", MIXTURE)):
        path = save_tiny_model(kind, tmp_path_factory.mktemp(kind), num_key_value_heads=4)
        places = {place: values[:3] for place, values in PLACES.items()}
        ranks = run_ranks(4, "tests.distributed.lanes_worker:take_shares", str(path), layouts, places)
        found |= {layout: (path, ranks) for layout in layouts}
    return found


@pytest.mark.parametrize("layout", [*DENSE, *MIXTURE])
@pytest.mark.parametrize("place", PLACES)
def test_each_rank_hands_over_its_share_of_the_checkpoint(shares, place, layout):
    path, ranks = shares[layout]
    found, nodes = [rank[layout, place] for rank in ranks], PLACES[place][3]
    saved, entries = load_file(path / "model.safetensors"), WeightMapping(read_shape(path)).entries
    assert list(found[0]["ranks"].values()) == nodes
    assert check_complete(entries, [bucket for turn in found[0]["turns"] for _, bucket in turn]) is None
    carried = [sum(rows.nbytes for rows in each["rows"].values()) for each in found]
    for node in nodes:
        tensors = put_together(entries, found, node)
        assert tensors.keys() == saved.keys()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in tensors.items())
        whole = sum(carried[rank] for rank in node)
        assert max(carried[rank] for rank in node) < 1.3 * whole / len(node), "what several hold goes where there is least"
    for rank, each in enumerate(found):
        assert sorted(each["rows"]) == sorted(each["share"])
        assert bool(each["rows"]) == (rank in sum(nodes, []))
        assert each["received"] <= carried[rank] * (0 if (layout, place) in HAS_ALL else 1), "nothing else passes through"


def put_together(entries, found, node):
    """What the workers of a node make of the buckets of its lanes; those of a turn in another order than they were made."""
    assembly, tensors = Assembly(entries), {}
    for turn in found[0]["turns"]:
        assert len({lane for lane, _ in turn}) == len(turn), "no lane comes twice in a turn"
        for lane, bucket in reversed(turn):
            for piece in bucket:
                tensors |= dict(assembly.add(piece, found[node[lane]]["rows"][title(piece)]))
    return tensors
