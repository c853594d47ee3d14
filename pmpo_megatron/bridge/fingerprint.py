"""A number that changes when a tensor's bytes do: taken by the sender and, of what arrived, by every receiver."""

from __future__ import annotations

import torch
import xxhash

SAMPLES = 64  # blocks
BLOCK = 64  # bytes
PIECE = 1 << 22  # 8-byte words summed at once on a GPU
FACTOR = -7046029254386353131  # 2^64 divided by the golden ratio, as a signed word: odd, its bits well spread


def fingerprint(tensor: torch.Tensor, mode: str) -> int:
    """64-bit fingerprint of the bytes of ``tensor``; 0 for mode ``off``.

    ``full`` reads all bytes, at the speed of memory; ``sample`` reads 64 blocks of 64 bytes spread over the tensor. XXH3 of
    a tensor on CPU, `weighted_sum` of one on a GPU: two ends can be compared if both hold it on the same kind of device.
    """
    if mode == "off":
        return 0
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    size = data.numel()
    if mode == "sample" and size > SAMPLES * BLOCK:
        starts = torch.linspace(0, size - BLOCK, SAMPLES, dtype=torch.float64).long()
        data = data[(starts.unsqueeze(1) + torch.arange(BLOCK)).flatten().to(data.device)]
    if data.device.type == "cpu":
        return xxhash.xxh3_64_intdigest(data.numpy().data, seed=size)
    return weighted_sum(data, seed=size)


def weighted_sum(data: torch.Tensor, *, seed: int) -> int:
    """sum over 8-byte words i of (word + seed) * (2i + 1) * FACTOR, modulo 2^64; ``data`` is uint8, padded with zeros.

    Every weight is odd, so a change of one word always shows; words that change places practically do.
    """
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    words = (data if data.numel() % 8 == 0 else torch.nn.functional.pad(data, (0, -data.numel() % 8))).view(torch.int64)
    for start in range(0, words.numel(), PIECE):
        piece = words[start : start + PIECE]
        weights = 2 * torch.arange(start, start + piece.numel(), dtype=torch.int64, device=data.device) + 1
        total += ((piece + seed) * (weights * FACTOR)).sum()
    return int(total) % (1 << 64)
