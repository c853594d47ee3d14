#!/usr/bin/env python
"""The PMPO objective beside a distributed bisection and GRPO: time and collectives, forward and backward, on real gloo ranks.

  pmpo       evaluate_objective with the preset: rule ess, p by the solver, one collective
  linear     the same with rule linear: the table of all orders, but nothing to solve; one collective
  fixed      evaluate_objective with preset grpo: p is known, so that there is nothing to solve; one collective
  bisection  the same objective, p by distributed bisection: one all-reduce per step for all trajectories at once
  grpo       textbook GRPO without a power mean: ratio, clip, mean per trajectory; one all-reduce, of the loss it reports

Every rank holds 1/ranks of every trajectory's tokens. A time is the median over the repeats of the slowest rank's.
Ranks beyond the machine's cores share them: their times are mostly those of waiting for each other.
"""

import argparse
import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pmpo_megatron.algo.objective import PRESETS, ObjectiveConfig, evaluate_objective

LOW, HIGH = PRESETS["pmpo"].log_bounds
RULE = PRESETS["pmpo"].exponent_rule
STEPS = 31  # bisections to |error of p| < 5e-10, where solve_ess is as well: see the last column


def make_batch(tokens: int, trajectories: int, rank: int, ranks: int) -> tuple[torch.Tensor, ...]:
    """This rank's zig-zag shard of a stale batch: log-ratios of std 0.2, 1 in 500 of them four times as large; both signs."""
    generator = torch.Generator().manual_seed(0)
    trajectory_T = torch.arange(tokens) * trajectories // tokens
    old_T = -3 * torch.rand(tokens, generator=generator)
    log_ratio_T = 0.2 * torch.randn(tokens, generator=generator)
    log_ratio_T[::500] *= 4
    advantages_N = torch.randn(trajectories, generator=generator)
    chunk_T = (torch.arange(tokens) % (tokens // trajectories)) * 2 * ranks // (tokens // trajectories)
    mine_T = torch.minimum(chunk_T, 2 * ranks - 1 - chunk_T) == rank
    mine = ((old_T + log_ratio_T)[mine_T].requires_grad_(), old_T[mine_T], trajectory_T[mine_T])
    return *mine, advantages_N, torch.full((trajectories,), 1 / trajectories)


def ours(config: ObjectiveConfig):
    def evaluate(batch, lengths_N, reduce):
        out = evaluate_objective(*batch, config, sum_over_shards=reduce)
        out.surrogate.backward()
        return out.loss, out.p_N

    return evaluate


def bisection(batch, lengths_N, reduce):
    log_probs_T, old_T, trajectory_T, advantages_N, weights_N = batch
    log_ratio_T = log_probs_T - old_T
    sign_T = advantages_N.sign().index_select(0, trajectory_T)
    r_T = log_ratio_T.detach().double()
    clipped_T = ((sign_T > 0) & (r_T > HIGH)) | ((sign_T < 0) & (r_T < LOW))
    x_T = torch.where(clipped_T, r_T.clamp(LOW, HIGH), r_T)

    def sums(p_N, *more):
        power_T = torch.exp(p_N.index_select(0, trajectory_T) * x_T)
        columns = torch.stack([power_T, power_T * power_T, *more], dim=-1)
        return reduce(x_T.new_zeros(len(p_N), columns.shape[1]).index_add_(0, trajectory_T, columns)).unbind(-1)

    low_N, high_N = torch.zeros_like(lengths_N), torch.ones_like(lengths_N)
    s1_N, s2_N, clipped_N = sums(high_N, clipped_T.double())
    at_one_N = s1_N**2 / s2_N / lengths_N
    target_N = 1 - (1 - RULE.ess_target) * (1 - (clipped_N / lengths_N / RULE.clip_reference).clamp(max=1))
    for _ in range(STEPS):
        s1_N, s2_N = sums(p_N := (low_N + high_N) / 2)
        above_N = s1_N**2 / s2_N / lengths_N > target_N
        low_N, high_N = torch.where(above_N, p_N, low_N), torch.where(above_N, high_N, p_N)
    p_N = torch.where(at_one_N >= target_N, 1.0, (low_N + high_N) / 2)
    s1_N, _ = sums(p_N)
    scale_N = weights_N * advantages_N * (s1_N / lengths_N) ** (1 / p_N)
    power_T = torch.exp(p_N.index_select(0, trajectory_T) * x_T)
    coefficient_T = torch.where(clipped_T, 0.0, (-scale_N / s1_N).index_select(0, trajectory_T) * power_T)
    (coefficient_T * log_ratio_T).sum().backward()
    return -scale_N.sum(), p_N


def grpo(batch, lengths_N, reduce):
    log_probs_T, old_T, trajectory_T, advantages_N, weights_N = batch
    ratio_T = torch.exp(log_probs_T - old_T)
    advantage_T = advantages_N.index_select(0, trajectory_T)
    value_T = torch.minimum(ratio_T * advantage_T, ratio_T.clamp(0.8, 1.2) * advantage_T)
    (loss := -(value_T * (weights_N / lengths_N).float().index_select(0, trajectory_T)).sum()).backward()
    return reduce(loss.detach().clone()), None


WAYS = {
    "pmpo": ours(PRESETS["pmpo"]),
    "linear": ours(ObjectiveConfig(rule="linear")),
    "fixed": ours(PRESETS["grpo"]),
    "bisection": bisection,
    "grpo": grpo,
}


def measure(rank: int, ranks: int, options: argparse.Namespace, rendezvous: str, queue) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    calls, clock = [], time.thread_time if options.processor_time else time.perf_counter

    def reduce(table):
        calls.append(table.shape)
        dist.all_reduce(table)
        return table

    for tokens in options.tokens:
        batch = make_batch(tokens, options.trajectories, rank, ranks)
        lengths_N = torch.full((options.trajectories,), tokens / options.trajectories, dtype=torch.float64)
        times, collectives, results = {way: [] for way in WAYS}, {}, {}
        for _ in range(options.repeats + 2):
            for way, evaluate in WAYS.items():
                batch[0].grad = None
                calls.clear()
                dist.barrier()
                started = clock()
                results[way] = evaluate(batch, lengths_N, reduce)
                elapsed, collectives[way] = torch.tensor(clock() - started, dtype=torch.float64), len(calls)
                dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
                times[way].append(1e3 * elapsed.item())
        if rank == 0:
            gap = (results["pmpo"][1] - results["bisection"][1]).abs().max().item()
            queue.put((tokens, {way: statistics.median(ms[2:]) for way, ms in times.items()}, collectives, gap))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768, 131072], help="tokens of the whole micro-batch")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="processes that share each trajectory")
    parser.add_argument("--trajectories", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument(
        "--processor-time", action="store_true", help="not the clock's: of this thread, without waiting for others"
    )
    options = parser.parse_args()
    print(f"{options.trajectories} trajectories, {os.cpu_count()} cores, {STEPS} bisections, median of {options.repeats}")
    print(f"{'':14}|{'milliseconds':^44}|{'collectives':^23}|{'times of grpo':^32}| largest difference")
    times = "    pmpo  linear   fixed  bisection     grpo | pmpo bisection  grpo | pmpo  linear   fixed  bisection"
    print(f" ranks  tokens|{times}| of p, pmpo")
    fewer, slower, queue = [], [], mp.get_context("spawn").SimpleQueue()
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as directory:
            mp.spawn(measure, (ranks, options, f"{directory}/store", queue), nprocs=ranks)
        for _ in options.tokens:
            tokens, ms, count, gap = queue.get()
            ratio = {way: ms[way] / ms["grpo"] for way in WAYS}
            fewer.append(count["bisection"] / count["pmpo"])
            slower += [ratio] if tokens == 32768 else []
            times = f"{ms['pmpo']:>8.2f} {ms['linear']:>7.2f} {ms['fixed']:>7.2f} {ms['bisection']:>10.2f} {ms['grpo']:>8.2f}"
            counts = f"{count['pmpo']:>5} {count['bisection']:>9} {count['grpo']:>5}"
            ratios = f"{ratio['pmpo']:>5.1f} {ratio['linear']:>7.2f} {ratio['fixed']:>7.2f} {ratio['bisection']:>10.1f}"
            print(f"{ranks:>6} {tokens:>7}|{times} |{counts} |{ratios}| {gap:.0e}")
    print(f"collectives, bisection / pmpo: {min(fewer):.0f}; at least 10: {'met' if min(fewer) >= 10 else 'not met'}")
    for ranks, ratio in zip(options.ranks, slower, strict=False):
        for way, aim in (("pmpo", 2.0), ("linear", 1.3), ("fixed", 1.3)):
            met = "met" if ratio[way] <= aim else "not met"
            print(f"time at 32768 tokens, {ranks} ranks, {way} / grpo: {ratio[way]:.2f}; at most {aim:g}: {met}")


if __name__ == "__main__":
    main()
