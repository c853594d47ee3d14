"""What the program's start says of a process: its rank, and the device that it may use."""

from __future__ import annotations

import os

import torch

from pmpo_megatron.errors import ConfigError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank_variables() -> tuple[int, int, int]:
    """(rank, world size, rank on this machine) that torchrun gave this process.

    Raises:
        ConfigError: it was not started by torchrun.
    """
    missing = [name for name in RANK_VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError("environment", f"{', '.join(missing)} not set; start the program with torchrun")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def choose_device(device: str | None, local_rank: int) -> torch.device:
    """The device of this process; ``device`` is ``cpu``, ``cuda``, or ``auto`` (or None) for the GPU where there is one.

    Raises:
        ConfigError: this machine does not have it, or not for this rank.
    """
    available = torch.cuda.is_available()
    if device in (None, "auto"):
        device = "cuda" if available else "cpu"
    if device == "cpu":
        if available:  # Megatron asks CUDA for its device wherever CUDA answers
            raise ConfigError("run.device", "cpu on a machine with GPUs needs CUDA_VISIBLE_DEVICES= in the environment")
        return torch.device("cpu")
    if device != "cuda":
        raise ConfigError("run.device", f"{device!r} is not one of 'cpu', 'cuda', 'auto'")
    if not available:
        raise ConfigError("run.device", "cuda, but PyTorch sees no GPU here; use cpu, or install a CUDA build of PyTorch")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError("run.device", f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
