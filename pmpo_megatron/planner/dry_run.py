"""What ``pmpo-train --dry-run`` says of memory and time."""

from __future__ import annotations

import torch

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.hf.known_models import model_shape
from pmpo_megatron.planner.engine import split_problem
from pmpo_megatron.planner.hardware import Hardware, hardware_here, host_bytes
from pmpo_megatron.planner.parameters import state_bytes
from pmpo_megatron.planner.records import Plan
from pmpo_megatron.planner.run_plan import plan
from pmpo_megatron.planner.search import best_engines
from pmpo_megatron.planner.text import engines_settings, plan_lines
from pmpo_megatron.training.run_config import RunConfig
from pmpo_megatron.units import GIB, resolve_dtype


def memory_report(config: RunConfig, world_size: int, hardware: Hardware | None = None) -> list[str]:
    """Lines about the run's memory and time.

    Estimates only inform; what is certain is an error: weights, gradients, optimizer states and vLLM's share alone are
    more than a GPU has, or vLLM cannot split the model as asked.

    Args:
        hardware: None: this machine's GPUs, or H100s where it has none.

    Raises:
        ConfigError: the run cannot fit.
    """
    if config.run.device == "cpu" or (config.run.device == "auto" and hardware is None and not torch.cuda.is_available()):
        return [_cpu_line(config, world_size)]
    planned = plan(config, world_size, hardware or hardware_here())
    split = split_problem(planned.shape, config.rollout.tensor_parallel)
    if split and config.rollout.beside_trainer:
        raise ConfigError("rollout.tensor_parallel", split)
    for gpu in planned.gpus:
        if gpu.certain > gpu.hardware.memory_gib * GIB:
            raise ConfigError(
                "parallel",
                f"{gpu.name} needs {gpu.certain / GIB:.1f} GiB without any activations, and {gpu.hardware.name} has "
                f"{gpu.hardware.memory_gib:.1f}; spread the model over more GPUs (tools/plan_run.py proposes a layout)",
            )
    return plan_lines(planned) + _faster_engines(planned)


def _faster_engines(planned: Plan) -> list[str]:
    """Other engines, or memory by turns, where they win a twentieth of a round or more."""
    best = best_engines(planned.config, planned.world_size, planned.hardware, count=1)
    if not best or best[0].round.seconds > 0.95 * planned.round.seconds:
        return []
    return [f"faster: {engines_settings(best[0])}"]


def _cpu_line(config: RunConfig, world_size: int) -> str:
    parallel, shape = config.parallel, model_shape(config.model.path)
    common = dict(
        replicas=world_size // (parallel.tensor * parallel.pipeline),
        dtype=resolve_dtype(config.model.dtype, "cpu"),
        distributed=config.optimizer.distributed,
    )
    most = max(state_bytes(shape, parallel, stage=stage, **common).total for stage in range(parallel.pipeline))
    here = host_bytes()
    if most > here:
        raise ConfigError(
            "run.device",
            f"{config.run.device}, and there is no GPU here: on CPU each process needs {most / GIB:.1f} GiB and this machine "
            f"has {here / GIB:.1f}; to plan for GPUs, set run.device=cuda",
        )
    return (
        f"memory: on CPU; weights, gradients and optimizer states {most / GIB:.2f} GiB in each process, this machine has "
        f"{here / GIB:.1f} GiB"
    )
