"""A plan as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from pmpo_megatron.planner.engine import engine_nodes
from pmpo_megatron.planner.memory import COLUMNS, GpuMemory
from pmpo_megatron.planner.parameters import active_parameters, total_parameters
from pmpo_megatron.planner.records import Plan
from pmpo_megatron.training.run_config import RunConfig
from pmpo_megatron.units import GIB


def layout_text(config: RunConfig, world_size: int) -> str:
    """Parallel layout, micro-batch and recomputation, in one line."""
    parallel = config.parallel
    interleaved = f" x{parallel.virtual_pipeline} interleaved" if parallel.virtual_pipeline else ""
    experts = f" EP{parallel.expert} ETP{parallel.expert_tensor_size}" if parallel.expert > 1 else ""
    return (
        f"TP{parallel.tensor}{'+SP' if parallel.sequence_parallel else ''} PP{parallel.pipeline}{interleaved} "
        f"CP{parallel.context} DP{parallel.data_parallel_size(world_size)}{experts}, micro-batches of "
        f"{config.batch.max_tokens_per_micro_batch} tokens, recompute {config.model.recompute}"
    )


def plan_lines(plan: Plan) -> list[str]:
    size, active = total_parameters(plan.shape) / 1e9, active_parameters(plan.shape) / 1e9
    used = f", of which a token uses {active:.2f}" if plan.shape.experts else ""
    lines = [
        f"plan: {plan.config.model.path} ({size:.2f} billion parameters{used}) on {plan.world_size} x {plan.hardware.name}",
        f"layout: {layout_text(plan.config, plan.world_size)}",
        *memory_table(plan),
        _recompute_line(plan),
    ]
    lines += _engine_lines(plan) + _moving_lines(plan) + [_checkpoint_line(plan), _communication_line(plan), *_time_lines(plan)]
    lines += [f"note: {note}" for note in plan.notes] + [f"problem: {problem}" for problem in plan.problems]
    return [*lines, _limit_line(plan), _verdict(plan)]


def memory_table(plan: Plan) -> list[str]:
    rows = [["GiB on the fullest GPU of", *COLUMNS]]
    rows += [[gpu.name, *gpu.row()] for gpu in _without_repetition(plan)]
    return _table(rows)


def _recompute_line(plan: Plan) -> str:
    parts = ", ".join(f"{mode} {amount / GIB:.1f}" for mode, amount in plan.recompute.items())
    return f"activations and log-probs on the fullest GPU, GiB, by model.recompute: {parts}"


def _without_repetition(plan: Plan) -> list[GpuMemory]:
    """First and last stage and the fullest between them: middle stages differ in micro-batches in flight only."""
    last = plan.gpus[-1].stage
    middle = [gpu for gpu in plan.gpus if 0 < gpu.stage < last and not gpu.shared]
    shown = max(middle, key=lambda gpu: gpu.total, default=None)
    return [gpu for gpu in plan.gpus if gpu.stage in (0, last) or gpu.shared or gpu is shown]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        row[0].ljust(widths[0]) + "".join(f"  {c.rjust(w)}" for c, w in zip(row[1:], widths[1:], strict=True)) for row in rows
    ]


def _engines_text(count: int) -> str:
    return "vLLM" if count == 1 else f"{count} vLLMs"


def _engine_lines(plan: Plan) -> list[str]:
    engine, rollout = plan.engine, plan.config.rollout
    if engine is None:
        nodes = len(rollout.hosts)
        return [f"rollouts: from {nodes} node{'s' * (nodes > 1)} of their own" if nodes else "rollouts: recorded ones"]
    last = rollout.engines * rollout.tensor_parallel - 1
    nodes = engine_nodes(rollout, plan.world_size, plan.hardware)
    node = "the first node" if nodes == 1 else f"each of {nodes} nodes"
    where = f"GPUs 0-{last} of {node}, on each" if last else f"GPU 0 of {node}"
    forward = engine.forward + engine.graphs
    lines = [
        f"{_engines_text(rollout.engines)} on {where}: weights {engine.weights / GIB:.1f} GiB, forward pass "
        f"{forward / GIB:.1f}, KV cache {max(engine.kv_cache, 0) / GIB:.1f} = {engine.kv_tokens} tokens, "
        f"{engine.kv_tokens // plan.load.longest} requests of the greatest length"
    ]
    if plan.generation is not None:
        running, speed = nodes * rollout.engines * plan.generation.running, plan.generation.tokens_per_s
        lines.append(f"rollouts: {running} requests at once, {speed:.0f} response tokens/s")
    return lines


def _moving_lines(plan: Plan) -> list[str]:
    if not plan.moved.total:
        return []
    node = plan.moved.total * plan.hardware.gpus_per_node
    return [
        f"while rollouts run: {plan.moved.total / GIB:.1f} GiB of a GPU in the host's memory, {node / GIB:.0f} of a node's; "
        f"out and back {plan.round.moving:.1f} s per round"
    ]


def engines_settings(plan: Plan) -> str:
    """Settings of engines and of memory by turns, and what they lead to, in one line."""
    model, rollout, whole = plan.config.model, plan.config.rollout, plan.round
    return (
        f"rollout.engines={rollout.engines} rollout.tensor_parallel={rollout.tensor_parallel} rollout.sleep={rollout.sleep} "
        f"rollout.kv_cache_gib={rollout.kv_cache_gib:g} rollout.gpu_memory_utilization={rollout.gpu_memory_utilization:g} "
        f"model.offload={model.offload} model.recompute={model.recompute}: {whole.seconds:.0f} s per round, rollouts "
        f"{whole.rollouts:.0f}, log-probs and steps {whole.training:.0f}; {plan.fullest.spare / GIB:.1f} GiB to spare"
    )


def _checkpoint_line(plan: Plan) -> str:
    needed = plan.checkpoint
    return (
        f"checkpoints: of the fullest node's memory {needed.saving / GIB:.0f} GiB while one is saved, "
        f"{needed.loading / GIB:.0f} while one is loaded; of a GPU's none while one is saved, {needed.gpu / GIB:.1f} while one "
        "is loaded"
    )


def _communication_line(plan: Plan) -> str:
    volume = plan.step.communication
    parts = [("tensor", volume.tensor), ("context", volume.context), ("pipeline", volume.pipeline), ("data", volume.data)]
    if plan.shape.experts is not None:
        parts.insert(3, ("experts", volume.experts))
    sent = ", ".join(f"{name} {amount / GIB:.1f}" for name, amount in parts)
    return f"sent by each GPU in an optimizer step, GiB: {sent}"


def _time_lines(plan: Plan) -> list[str]:
    step, whole, steps = plan.step, plan.round, plan.config.batch.steps_per_round
    waiting = step.communication.model_seconds + step.communication.data_seconds
    return [
        f"optimizer step: {step.seconds:.1f} s for {plan.load.trajectories} trajectories of {plan.load.mean:.0f} tokens "
        f"(assumed) in {plan.load.work.micro_batches} micro-batches per data-parallel rank; "
        f"{100 * waiting / step.seconds:.0f}% waiting for links, {100 * step.bubble / step.seconds:.0f}% idle in the pipeline",
        f"round: {whole.seconds:.0f} s = rollouts {whole.rollouts:.0f}{' beside' if whole.overlapped else ' +'} log-probs "
        f"{whole.scoring:.0f} + {steps} steps {whole.steps:.0f} + weights into vLLM {whole.weights:.0f}"
        f"{f' + memory moved {whole.moving:.0f}' if plan.moved.total else ''}"
        " (estimates; the figures behind them are in planner/hardware.py)",
    ]


def _limit_line(plan: Plan) -> str:
    whole, fullest = plan.round, plan.fullest
    phases = {
        "rollouts": whole.rollouts,
        "log-probs and optimizer steps": whole.training,
        "moving weights into vLLM": whole.weights,
    }
    slowest = max(phases, key=phases.__getitem__)
    share = 100 * phases[slowest] / max(whole.seconds, 1e-9)
    return f"limits: memory by {fullest.largest()} on {fullest.name}; time by {slowest} ({min(share, 100):.0f}% of a round)"


def _verdict(plan: Plan) -> str:
    spare = plan.fullest.spare / GIB
    if plan.fits:
        return f"fits, with {spare:.1f} GiB to spare on the fullest GPU"
    return f"does not fit: {len(plan.problems)} problem{'s' * (len(plan.problems) > 1)}"
