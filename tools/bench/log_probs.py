#!/usr/bin/env python
"""Log-probs and entropies of target tokens, forward and backward: in chunks (pmpo_megatron.model.log_probs) and the plain way.

The plain way is what a trainer without chunks does: logits, log_softmax, gather, entropy without gradient. Every variant
runs in a process of its own; "extra" is the peak beyond what that process held when its inputs were in memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from pathlib import Path

import torch


def plain(hidden_TH, weight_VH, targets_T, temperature):
    log_probs_TV = torch.log_softmax(hidden_TH @ weight_VH.t() / temperature, dim=-1)
    with torch.no_grad():
        entropy_T = -(log_probs_TV.exp() * log_probs_TV).sum(-1)
    return log_probs_TV.gather(1, targets_T.unsqueeze(1)).squeeze(1), entropy_T


def chunked(hidden_TH, weight_VH, targets_T, temperature, chunk):
    from pmpo_megatron.model.log_probs import token_log_probs

    log_probs_T, entropy_T = token_log_probs(
        hidden_TH, weight_VH, targets_T, vocab_size=weight_VH.shape[0], temperature=temperature, chunk_tokens=chunk
    )
    return log_probs_T, entropy_T.detach()


def measure(arguments: argparse.Namespace, chunk: int | None, queue) -> None:
    """Puts (forward s, backward s, extra MiB, check sums) of the fastest of ``--repeats`` runs into ``queue``."""
    torch.manual_seed(0)
    device = arguments.device
    hidden_TH = torch.randn(arguments.tokens, arguments.hidden, device=device).requires_grad_()
    weight_VH = torch.randn(arguments.vocabulary, arguments.hidden, device=device).mul_(0.02).requires_grad_()
    targets_T = torch.randint(0, arguments.vocabulary, (arguments.tokens,), device=device)
    grad_T = torch.randn(arguments.tokens, device=device)
    small = [hidden_TH[:64].detach().requires_grad_(), weight_VH[:1000].detach().requires_grad_(), targets_T[:64] % 1000]
    run = plain if chunk is None else lambda *inputs: chunked(*inputs, chunk)
    run(*small, 0.9)[0].sum().backward()  # threads, imports and kernels are loaded before anything is measured
    before, found = held(device), []
    for _ in range(arguments.repeats):
        hidden_TH.grad = weight_VH.grad = None
        started = time.perf_counter()
        log_probs_T, entropy_T = run(hidden_TH, weight_VH, targets_T, 0.9)
        middle = synchronised(device)
        log_probs_T.backward(grad_T)
        ended = synchronised(device)
        found.append((ended - started, middle - started, ended - middle))
        sums = [log_probs_T.sum(), entropy_T.sum(), hidden_TH.grad.norm(), weight_VH.grad.norm()]
        checks = [float(value.detach()) for value in sums]
    total, forward, backward = min(found)
    queue.put((total, forward, backward, (peak(device) - before) / 2**20, checks))


def synchronised(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def held(device: str) -> float:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_own_process(arguments: argparse.Namespace, chunk: int | None):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(arguments, chunk, queue))
    process.start()
    while process.is_alive() and queue.empty():
        process.join(0.2)
    if queue.empty():
        raise SystemExit(f"the process of chunk {chunk} ended with code {process.exitcode} (not enough memory?)")
    result = queue.get()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 256, 512], help="tokens whose logits exist at once")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    print(f"{arguments.tokens} tokens x {arguments.vocabulary} vocabulary, hidden {arguments.hidden}, float32")
    print("way         forward s  backward s   total s   vs plain   extra MiB   vs plain   largest relative difference")
    reference = None
    for chunk in (None, *arguments.chunks):
        total, forward, backward, extra, checks = in_own_process(arguments, chunk)
        reference = reference or (total, extra, checks)
        difference = max(abs(a - b) / abs(b) for a, b in zip(checks, reference[2], strict=True))
        name = "plain" if chunk is None else f"chunk {chunk}"
        print(
            f"{name:<10} {forward:>10.2f} {backward:>11.2f} {total:>9.2f} {total / reference[0]:>9.2f}x {extra:>11.0f}"
            f" {extra / reference[1]:>9.3f}x {difference:>12.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
