"""What the processes of `test_engine` run: real CUDA builds, with the stand-ins for the driver."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from tests.emulation import cuda_calls

PRELOAD = "pmpo_megatron.rollout.vllm_preload"


def configurations(cases: dict[str, tuple[str, list[str], str, dict[str, bool]]]) -> dict[str, dict[str, Any]]:
    """What vLLM makes of the project's settings.

    Args:
        cases: by name (recipe, overrides, directory of its model, further arguments of `engine_settings`).
    """
    _preload()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    from pmpo_megatron.config import apply_overrides, build, read_yaml
    from pmpo_megatron.rollout.vllm_settings import engine_settings
    from pmpo_megatron.training.assembly import WORKER_EXTENSION
    from pmpo_megatron.training.run_config import RunConfig

    made = {}
    for name, (recipe, overrides, model, how) in cases.items():
        config = build(RunConfig, apply_overrides(read_yaml(Path(recipe)), overrides))
        settings = engine_settings(config.rollout, model, "cuda", WORKER_EXTENSION, **how)
        made[name] = _described(EngineArgs(**settings).create_engine_config(usage_context=UsageContext.LLM_CLASS))
    return made


def _preload() -> None:
    """Imports vLLM as the fork server of a run on GPUs does."""
    os.environ["PMPO_ROLLOUT_DEVICE"] = "cuda"
    importlib.import_module(PRELOAD)


def _described(config: Any) -> dict[str, Any]:
    """Of a VllmConfig what decides how the engine runs."""
    from vllm.device_allocator.cumem import cumem_available

    model, cache = config.model_config, config.cache_config
    parallel, scheduler = config.parallel_config, config.scheduler_config
    groups = model.get_num_kv_heads(parallel)
    return {
        "device": config.device_config.device_type,
        "executor": parallel.distributed_executor_backend,
        "tensor_parallel": parallel.tensor_parallel_size,
        "expert_parallel": parallel.enable_expert_parallel,
        "worker": parallel.worker_cls,
        "clashes": _clashes(parallel),
        "new_runner": config.use_v2_model_runner,
        "async_scheduling": scheduler.async_scheduling,
        "batched_tokens": scheduler.max_num_batched_tokens,
        "requests": scheduler.max_num_seqs,
        "longest": model.max_model_len,
        "kv_cache_bytes": cache.kv_cache_memory_bytes,
        "kv_bytes_per_token": 2 * model.get_num_layers(parallel) * groups * model.get_head_size() * model.dtype.itemsize,
        "utilization": cache.gpu_memory_utilization,
        "prefix_caching": cache.enable_prefix_caching,
        "log_probs": model.logprobs_mode,
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "quantizer": type(config.quant_config).__name__,
        "sleep": model.enable_sleep_mode,
        "allocator": cumem_available,  # of memory that sleeping engines free and take again: it is linked and loads
        "graphs": config.compilation_config.cudagraph_mode.name,
        "routes": config.aux_output_config.enabled,
    }


def _clashes(parallel: Any) -> list[str]:
    """Names that vLLM's worker and the receiver of weights both have, for which vLLM refuses to mix them."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    worker, extension = resolve_obj_by_qualname(parallel.worker_cls), resolve_obj_by_qualname(parallel.worker_extension_cls)
    return [name for name in dir(extension) if not name.startswith("__") and hasattr(worker, name)]


def start(path: str, tensor_parallel: int) -> str:
    """Why an engine of the model in ``path`` does not start; it must not, without a GPU."""
    from pmpo_megatron.errors import RolloutError
    from pmpo_megatron.rollout.config import RolloutConfig
    from pmpo_megatron.rollout.factory import make_engine
    from pmpo_megatron.training.assembly import WORKER_EXTENSION

    config = RolloutConfig(kv_cache_gib=0.25, tensor_parallel=tensor_parallel)
    try:
        make_engine(config, model_path=path, device="cuda", worker_extension=WORKER_EXTENSION).close()
    except RolloutError as error:
        return str(error)
    return "it started"


def forks() -> dict[str, Any]:
    """The GPUs of a node's second engine of two, and how CUDA stands in a process that the engines' fork server has forked."""
    from pmpo_megatron.rollout.vllm_settings import visible_gpus

    gpus = visible_gpus(1, 2)
    os.environ["PMPO_ROLLOUT_DEVICE"] = "cuda"  # as `LocalProcess` does
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([cuda_calls.__name__, PRELOAD])
    with context.Pool(1) as pool:
        return {"engine": pool.apply(how_cuda_stands), "gpus": gpus}


def how_cuda_stands() -> dict[str, Any]:
    import torch

    return {
        "vllm": "vllm.v1.engine.core" in sys.modules,
        "initialisations": cuda_calls.count,
        "initialised": torch.cuda.is_initialized(),
        "bad_fork": torch.cuda._is_in_bad_fork(),
    }
