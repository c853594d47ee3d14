"""A number that changes when a tensor's bytes do: taken by the sender and, of what arrived, by every receiver."""

from __future__ import annotations

import torch

BLOCK = 512  # 8-byte words
SAMPLES = 64  # words


def fingerprint(tensor: torch.Tensor, mode: str) -> int:
    """64-bit fingerprint of ``tensor``'s bytes, on CPU; 0 for mode ``off``.

    ``full`` reads all bytes, at the speed of memory: sums over blocks and over positions within blocks, each weighted by
    odd numbers, so that a changed, moved or swapped word shows. ``sample`` reads 64 words spread over the tensor.
    """
    if mode == "off":
        return 0
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    head = (
        data[: data.numel() // 8 * 8].clone().view(torch.int64)
        if data.data_ptr() % 8
        else data[: data.numel() // 8 * 8].view(torch.int64)
    )
    tail = data[head.numel() * 8 :].to(torch.int64)
    total = int((tail * _odd(len(tail))).sum()) + data.numel()
    if mode == "sample":
        where = torch.linspace(0, max(head.numel() - 1, 0), min(SAMPLES, head.numel()), dtype=torch.float64).long()
        chosen = head[where]
        return _wrap(total + int((chosen * _odd(len(chosen))).sum()))
    whole = head[: head.numel() // BLOCK * BLOCK].view(-1, BLOCK)
    rest = head[whole.numel() :]
    total += int((rest * _odd(len(rest))).sum())
    if len(whole):
        total += int((whole.sum(1) * _odd(len(whole))).sum()) + 3 * int((whole.sum(0) * _odd(BLOCK)).sum())
    return _wrap(total)


def _odd(count: int) -> torch.Tensor:
    """Distinct odd weights, spread over 64 bits (multiples of the golden ratio's)."""
    return (2 * torch.arange(count, dtype=torch.int64) + 1) * -7046029254386353131


def _wrap(value: int) -> int:
    return value & (2**64 - 1)
