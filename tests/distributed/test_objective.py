"""p, loss and gradients are the same on 1, 2 and 4 real processes, however the tokens are sharded."""

import os

import pytest
import torch
import torch.distributed as dist

from pmpo_megatron.algo.objective import PRESETS, ObjectiveConfig, evaluate_objective
from tests.distributed.harness import run_ranks
from tests.unit.algo.test_objective import make_batch

SHARDINGS = ("contiguous", "zigzag", "random", "one_rank_empty")
NAMES = {name: PRESETS[name] for name in ("pmpo", "grpo", "gmpo", "gspo", "holder", "cispo")} | {
    "linear": ObjectiveConfig(rule="linear"),
    "fixed": ObjectiveConfig(rule="fixed", p=0.5),
}


def owners(sharding, count, world_size):
    index = torch.arange(count)
    if sharding == "contiguous":
        return index * world_size // count
    if sharding == "zigzag":
        chunk = index * 2 * world_size // count
        return torch.minimum(chunk, 2 * world_size - 1 - chunk)
    if sharding == "random":
        return torch.randint(0, world_size, (count,), generator=torch.Generator().manual_seed(3))
    return index % max(1, world_size - 1)


def evaluate_all(dtype):
    """Every preset and sharding on this rank: {(name, sharding): numbers}."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), int(os.environ["WORLD_SIZE"])
    calls = []

    def reduce(table):
        calls.append(table)
        dist.all_reduce(table)
        return table

    found = {}
    for name in NAMES:
        for sharding in SHARDINGS:
            log_probs, old, trajectory, advantages, weights = make_batch(1, (200, 3, 0, 61), 0.5, dtype, outlier=6.0)
            mine = owners(sharding, len(trajectory), world_size) == rank
            part = log_probs[mine].detach().requires_grad_()
            calls.clear()
            out = evaluate_objective(
                part, old[mine], trajectory[mine], advantages, weights, NAMES[name], progress=0.2, sum_over_shards=reduce
            )
            assert len(calls) == 1, "one collective"
            out.surrogate.backward()
            gradient = torch.zeros(len(trajectory), dtype=torch.float64)
            gradient[mine] = part.grad.double()
            found[name, sharding] = (out.loss.item(), out.p_N.tolist(), out.ess_N.tolist(), gradient.tolist())
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_sharded_equals_single_process(dtype, tolerance):
    [single] = run_ranks(1, "tests.distributed.test_objective:evaluate_all", dtype)
    for world_size in (2, 4):
        ranks = run_ranks(world_size, "tests.distributed.test_objective:evaluate_all", dtype)
        for key, (loss, _, _, gradient) in single.items():
            scale = max(1.0, max(map(abs, gradient)), abs(loss))
            for found in ranks:
                assert abs(found[key][0] - loss) <= tolerance * scale, (key, found[key][0], loss)
                for which, allowed in (
                    (1, max(tolerance, 1e-9) if NAMES[key[0]].rule == "ess" else tolerance),
                    (2, tolerance * 300),
                ):
                    ours, wanted = (torch.tensor(result[which], dtype=torch.float64) for result in (found[key], single[key]))
                    assert torch.allclose(ours, wanted, atol=allowed, rtol=0), key
            total = sum(torch.tensor(found[key][3], dtype=torch.float64) for found in ranks)
            assert (total - torch.tensor(gradient, dtype=torch.float64)).abs().max() <= tolerance * scale, key
