"""Rank 0's work while the others stand by, and a round's trajectories on their way to the replicas that train on them."""

import threading

import numpy as np

from tests.distributed.harness import run_ranks


def stand_by_and_share(counts):
    """What this rank saw of two services, and the samples that it got of rounds of so many ``counts``."""
    from pmpo_megatron.parallel.collectives import any_rank
    from pmpo_megatron.parallel.stand_by import StandBy
    from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down
    from pmpo_megatron.training.shares import share_samples
    from pmpo_megatron.types import TrajectoryTable

    state = initialize(ParallelConfig(tensor=2), device="cpu")
    stand_by, calls = StandBy(state), []
    first, second = (stand_by.offer(lambda name=name: calls.append((name, any_rank(True, state)))) for name in "ab")
    value = stand_by.run(lambda: [second(), first(), second(), threading.current_thread().name])
    found = {"value": value, "calls": calls, "replica": state.dp_rank, "members": [], "samples": []}
    found["ranks"] = [state.ranks_of_replica(replica) for replica in range(state.dp_size)]
    stand_by.close()
    found["late"] = first()
    for count in counts:
        made = make_samples(count)
        numbers = np.arange(count)
        split = [[numbers[0::4], numbers[1::4]], [numbers[2::4], numbers[3::4]]]
        mine = share_samples(made if state.is_main else (), TrajectoryTable.of(made, [0.0] * count), [split], state)
        found["members"].append(np.concatenate(split[state.dp_rank]).tolist())
        found["samples"].append({number: vars(sample) for number, sample in mine.items()})
    shut_down()
    return found


def make_samples(count):
    from pmpo_megatron.types import Sample

    rng = np.random.default_rng(count)
    made = []
    for number in range(count):
        prompt, response = rng.integers(1, 9), rng.integers(0, 30)
        ids = rng.integers(0, 1 << 20, prompt + response, dtype=np.int32)
        log_probs = rng.standard_normal(response).astype(np.float32)
        sampled = np.arange(response) % 5 > 1 if number % 2 and response else None
        rest = (log_probs, number % 3 == 0, rng.standard_normal(), sampled)
        made.append(Sample(number, number // 4, ids[:prompt], ids[prompt:], *rest))
    return made


def test_all_ranks_serve_rank_0_and_each_gets_its_own_samples_bit_by_bit():
    counts = (21, 1, 3)  # with one, the second replica has none
    ranks = run_ranks(4, "tests.distributed.test_shares:stand_by_and_share", counts)
    assert [rank["value"] for rank in ranks[1:]] == [None] * 3
    assert ranks[0]["value"][:3] == [True] * 3 and ranks[0]["value"][3] != "MainThread"
    assert all(rank["calls"] == [("b", True), ("a", True), ("b", True)] and rank["late"] is False for rank in ranks)
    assert all(
        rank["replica"] == next(d for d, group in enumerate(rank["ranks"]) if n in group) for n, rank in enumerate(ranks)
    )
    for number, count in enumerate(counts):
        expected = [vars(sample) for sample in make_samples(count)]
        assert sorted(ranks[0]["samples"][number]) == list(range(count)), "rank 0 keeps what it has"
        for rank in ranks[1:]:
            assert sorted(rank["samples"][number]) == sorted(rank["members"][number]), "and the others get no more than theirs"
        for rank in ranks:
            for i, found in rank["samples"][number].items():
                assert all(np.array_equal(found[name], value) for name, value in expected[i].items())
                assert (found["prompt_ids"].dtype, found["rollout_log_probs"].dtype) == (np.int32, np.float32)
