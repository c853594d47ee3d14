"""Weights with fewer bits, to study a mismatch between trainer and engine."""

from __future__ import annotations

import torch


def round_matrix(tensor: torch.Tensor, rounding: str) -> torch.Tensor:
    """``tensor`` in its own type with values that ``rounding`` (none, bf16, fp8) can hold; vectors stay as they are.

    fp8 is e4m3, its largest value, 448, at the tensor's largest.
    """
    if rounding == "none" or tensor.dim() < 2:
        return tensor
    if rounding == "bf16":
        return tensor.bfloat16().to(tensor.dtype)
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = (tensor.abs().amax().float() / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return ((tensor.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(tensor.dtype)
