"""Log-probs over a vocabulary that real processes share, one of which may hold nothing but padding."""

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_ranks

TOKENS, HIDDEN, TEMPERATURE = 23, 12, 0.7
ROWS = 32  # of the padded vocabulary


def problem():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = 0.3 * torch.randn(TOKENS, HIDDEN, generator=generator), torch.randn(ROWS, HIDDEN, generator=generator)
    return hidden, weight, torch.rand(TOKENS, generator=generator), torch.randn(2, TOKENS, generator=generator)


def targets_of(uniform, vocab_size):
    return (uniform * vocab_size).long()


def shards(cases):
    """For each (vocabulary size, chunk): log-probs, entropies, and this rank's part of both gradients."""
    from pmpo_megatron.model.log_probs import token_log_probs

    dist.init_process_group("gloo")
    found = []
    for vocab_size, chunk in cases:
        hidden, weight, uniform, upstream = problem()
        weight[vocab_size:] = 30.0  # padding that would be seen
        hidden, mine = hidden.requires_grad_(), weight.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
        settings = dict(vocab_size=vocab_size, temperature=TEMPERATURE, chunk_tokens=chunk, group=dist.group.WORLD)
        log_probs, entropy = token_log_probs(hidden, mine, targets_of(uniform, vocab_size), **settings)
        (log_probs * upstream[0] + entropy * upstream[1]).sum().backward()
        found.append([x.detach() for x in (log_probs, entropy, hidden.grad, mine.grad)])
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_of_the_vocabulary_equal_the_whole(world_size):
    cases = [(ROWS, 7), (29, 7), (29, 100), (15, 4)]  # with 4 processes, 15 words leave the last two only padding
    ranks = run_ranks(world_size, "tests.distributed.test_log_probs:shards", cases)
    for number, (vocab_size, _) in enumerate(cases):
        hidden, weight, uniform, upstream = (x.double() for x in problem())
        hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
        table = (hidden @ weight[:vocab_size].t() / TEMPERATURE).log_softmax(-1)
        log_probs = table.gather(1, targets_of(uniform, vocab_size)[:, None])[:, 0]
        entropy = -(table.exp() * table).sum(-1)
        (log_probs * upstream[0] + entropy * upstream[1]).sum().backward()
        results = [rank[number] for rank in ranks]
        for rank in results:
            torch.testing.assert_close(rank[0].double(), log_probs.detach(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(rank[1].double(), entropy.detach(), rtol=1e-5, atol=1e-5)
            assert torch.equal(rank[0], results[0][0]) and torch.equal(rank[1], results[0][1])
        torch.testing.assert_close(sum(rank[2] for rank in results).double(), hidden.grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.cat([rank[3] for rank in results]).double(), weight.grad, rtol=1e-5, atol=1e-5)
