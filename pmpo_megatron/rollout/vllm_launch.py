"""How a vLLM is started: its settings, and the variables with which it takes its own cores and GPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from pmpo_megatron.errors import RolloutError


@dataclass(frozen=True)
class Launch:
    """How a vLLM is started.

    Attributes:
        settings: arguments of vLLM's LLM.
        device: ``cpu`` or ``cuda``.
        threads: of the process; None: its share of its host's cores on CPU, one on GPUs.
        number: which of the host's engines this is, of ``engines``; it takes the next ``tensor_parallel`` GPUs.
    """

    settings: dict[str, Any]
    device: str
    threads: int | None
    number: int
    engines: int

    def environment(self) -> dict[str, str]:
        """What the environment of the process has beside this one's.

        Raises:
            RolloutError: the host has too few GPUs.
        """
        share = max(1, (os.cpu_count() or 1) // self.engines) if self.device == "cpu" else 1
        variables = {"OMP_NUM_THREADS": str(self.threads or share)}
        if self.device == "cuda" and self.number:
            variables["CUDA_VISIBLE_DEVICES"] = visible_gpus(self.number, self.settings["tensor_parallel_size"])
        return variables


def visible_gpus(number: int, tensor_parallel: int) -> str:
    """CUDA_VISIBLE_DEVICES with which the host's engine ``number`` takes its own GPUs.

    They come first and the others after them: it uses only its own, and can open the trainer's memory.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = listed.split(",") if listed else [str(gpu) for gpu in range(torch.cuda.device_count())]
    first = number * tensor_parallel
    if first + tensor_parallel > len(gpus):
        last = first + tensor_parallel - 1
        raise RolloutError(f"engine {number} of the rollouts needs GPUs {first} to {last}; here are {len(gpus)}")
    return ",".join(gpus[first:] + gpus[:first])
