"""How a vLLM is started: its arguments, its threads and its GPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from pmpo_megatron.errors import RolloutError
from pmpo_megatron.rollout.config import RolloutConfig
from pmpo_megatron.types import RouteFormat
from pmpo_megatron.units import GIB, resolve_dtype

DEFAULT_CPU_KV_CACHE_GIB = 0.5


@dataclass(frozen=True)
class Launch:
    """How a vLLM is started.

    Attributes:
        settings: arguments of vLLM's LLM.
        device: ``cpu`` or ``cuda``.
        threads: of the process; None: its share of its host's cores on CPU, one on GPUs.
        number: which of the host's engines this is, of ``engines``; it takes the next ``tensor_parallel`` GPUs.
        routes: of a mixture's tokens, which it gives with the responses; None: it does not.
    """

    settings: dict[str, Any]
    device: str
    threads: int | None
    number: int
    engines: int
    routes: RouteFormat | None = None

    def environment(self) -> dict[str, str]:
        """Of the process, on this host.

        Raises:
            RolloutError: the host has too few GPUs.
        """
        share = max(1, (os.cpu_count() or 1) // self.engines) if self.device == "cpu" else 1
        found = {"OMP_NUM_THREADS": str(self.threads or share)}
        if self.device == "cuda" and self.number:
            found["CUDA_VISIBLE_DEVICES"] = visible_gpus(self.number, self.settings["tensor_parallel_size"])
        return found


def engine_settings(
    config: RolloutConfig,
    model_path: str,
    device: str,
    worker_extension: str | None,
    *,
    in_flight: bool = False,
    routes: bool = False,
) -> dict[str, Any]:
    """Arguments of vLLM's LLM. Log-probs are those of the distribution that was sampled from (processed).

    With ``routes`` it must know those of every token: on GPUs vLLM keeps them beside the prefix cache.
    """
    settings = dict(
        model=model_path,
        dtype=resolve_dtype(config.dtype, device),
        tensor_parallel_size=config.tensor_parallel,
        max_num_seqs=config.max_num_seqs,
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        generation_config="vllm",  # sampling is ours alone, not the checkpoint's generation_config.json
        seed=0,
    )
    if worker_extension is not None:
        settings["worker_extension_cls"] = worker_extension
    if config.block_size is not None:
        settings["block_size"] = config.block_size
    if config.max_model_len is not None:
        settings["max_model_len"] = config.max_model_len
    if config.expert_parallel:
        settings["enable_expert_parallel"] = True
    if in_flight:
        settings["async_scheduling"] = False  # else vLLM 0.32 labels the step that is under way with the next version
    if routes:
        settings |= {"enable_prefix_caching": False} if device == "cpu" else {"enable_return_routed_experts": True}
    if device == "cpu":
        # A prompt that is computed in pieces breaks a seeded request there: PyTorch's CPU generators have no offset. Whole
        # prompts need a batch of at least max_model_len tokens, which is vLLM's default without chunks.
        settings |= dict(enforce_eager=True, enable_chunked_prefill=False)
        settings["kv_cache_memory_bytes"] = int((config.kv_cache_gib or DEFAULT_CPU_KV_CACHE_GIB) * GIB)
    else:
        settings |= _gpu_settings(config)
    return settings


def _gpu_settings(config: RolloutConfig) -> dict[str, Any]:
    settings: dict[str, Any] = dict(
        enforce_eager=config.enforce_eager,
        gpu_memory_utilization=config.gpu_memory_utilization,
        enable_sleep_mode=config.sleep != "none",
    )
    if config.quantization == "fp8":
        settings["quantization"] = "fp8_per_tensor"  # its "fp8" is for checkpoints that are in fp8 already
    if config.kv_cache_gib is not None:
        settings["kv_cache_memory_bytes"] = int(config.kv_cache_gib * GIB)
    return settings


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
