"""What ``pmpo-evaluate`` does: models answer benchmarks with the rollout engine and are scored as in training."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pmpo_megatron.benchmarks.models import Model, find_models, hugging_face_directory, tokenizer_of, weights_digest
from pmpo_megatron.benchmarks.records import BenchmarkRecords, ModelDirectory
from pmpo_megatron.benchmarks.run import Task, run_tasks
from pmpo_megatron.benchmarks.sources import Benchmark, find_benchmarks, problem_file
from pmpo_megatron.benchmarks.statistics import default_ks
from pmpo_megatron.benchmarks.summary import describe_benchmark, write_model_summary, write_summary
from pmpo_megatron.config import SectionT, apply_overrides, build, to_plain
from pmpo_megatron.data.prompts import DataConfig, load_prompts
from pmpo_megatron.errors import ConfigError
from pmpo_megatron.rewards import RewardConfig, RewardScorer
from pmpo_megatron.rewards.functions import CODE, check_functions
from pmpo_megatron.rollout.config import RolloutConfig, SamplingConfig
from pmpo_megatron.rollout.factory import make_engine
from pmpo_megatron.rollout.remote_process import own_nodes
from pmpo_megatron.training.launch import close_on_interrupt

logger = logging.getLogger(__name__)
ANY_LENGTH = 1 << 40  # prompts that are too long are counted by run_tasks, not left out


@dataclass(frozen=True)
class EvaluationPlan:
    """What is the same for every model."""

    out: Path
    benchmarks: tuple[Benchmark, ...]
    data: DataConfig  # template and fields; the source is each benchmark's own
    sampling: SamplingConfig
    reward: str  # scores the benchmarks that have none of their own
    rewards: RewardConfig
    rollout: RolloutConfig
    ks: tuple[int, ...]
    chunk: int
    device: str
    force: bool


def make_plan(options: argparse.Namespace) -> EvaluationPlan:
    """Everything that the options say, checked.

    Raises:
        ConfigError: an option is wrong; names it.
    """
    sampling = _sampling_config(options)
    data = DataConfig(
        source="-",
        problem_field=options.problem_field,
        answer_field=options.answer_field,
        template=options.template,
        system_prompt=options.system_prompt,
        max_problems=options.max_problems,
        max_prompt_tokens=ANY_LENGTH,
    )
    device = _device(options.device)
    rollout = _rollout_config(options, device)
    benchmarks = tuple(find_benchmarks(options.benchmarks, options.data_dir))
    rewards = _reward_config(options, benchmarks)
    ks = tuple(sorted(options.pass_k)) if options.pass_k else default_ks(options.samples)
    if ks and not 1 <= ks[0] <= ks[-1] <= options.samples:
        raise ConfigError("--pass-k", f"{list(ks)}: must lie between 1 and --samples, which is {options.samples}")
    at_once = rollout.max_num_seqs * rollout.engines * max(1, len(rollout.hosts))
    chunk = options.chunk if options.chunk is not None else max(1, 2 * at_once // options.samples)
    if chunk < 1:
        raise ConfigError("--chunk", f"{chunk} must be at least 1")
    return EvaluationPlan(
        out=options.out,
        benchmarks=benchmarks,
        data=data,
        sampling=sampling,
        reward=options.reward,
        rewards=rewards,
        rollout=rollout,
        ks=ks,
        chunk=chunk,
        device=device,
        force=options.force,
    )


def _sampling_config(options: argparse.Namespace) -> SamplingConfig:
    temperature = options.temperature if options.temperature is not None else 0.6 if options.samples > 1 else 0.0
    if options.samples > 1 and temperature == 0:
        raise ConfigError("--samples", f"{options.samples} with temperature 0 gives the same response every time")
    return SamplingConfig(
        samples_per_prompt=options.samples,
        temperature=temperature,
        top_p=options.top_p,
        max_tokens=options.max_tokens,
        stop=tuple(options.stop),
        seed=options.seed,
    )


def _section(option: str, section: type[SectionT], values: dict[str, Any], overrides: Sequence[str]) -> SectionT:
    """``section`` from ``values`` and what the command line's ``option`` overrides."""
    try:
        return build(section, apply_overrides(values, overrides))
    except ConfigError as error:
        raise error.within(option) from None


def _reward_config(options: argparse.Namespace, benchmarks: Sequence[Benchmark]) -> RewardConfig:
    """How responses are scored: ``functions`` has all that the benchmarks need, each alone for its own problems."""
    functions = {benchmark.reward or options.reward: 1.0 for benchmark in benchmarks}
    values = {"functions": functions, "workers": options.workers}
    rewards = _section("--rewards", RewardConfig, values, options.rewards)
    check_functions(rewards.functions, rewards.code)
    return rewards


def _rollout_config(options: argparse.Namespace, device: str) -> RolloutConfig:
    values = {"gpu_memory_utilization": 0.9}  # training leaves room for the trainer; here the GPU is the engine's alone
    config = _section("--rollout", RolloutConfig, values, options.rollout)
    if config.nodes == "all":
        raise ConfigError("--rollout.nodes", "an evaluation has one node; for more, nodes=own, hosts and pmpo-rollout-node")
    try:
        config.check_device(device)
    except ConfigError as error:
        raise error.within("--rollout") from None
    if find_spec("vllm") is None:
        raise ConfigError("--rollout.engine", "vllm is not installed; see the README for the requirements")
    return config


def _device(choice: str) -> str:
    if choice != "auto":
        return choice
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def settings_of(model: Model, plan: EvaluationPlan) -> dict[str, Any]:
    """What the responses and their scores depend on, plain values: an evaluation goes on only with the same."""
    settings = {"weights": weights_digest(model.path), "template": plan.data.template, "system_prompt": plan.data.system_prompt}
    settings |= to_plain(plan.sampling) | {"reward": plan.reward}
    return settings | {"dtype": plan.rollout.dtype, "max_model_len": plan.rollout.max_model_len}


def evaluate_model(model: Model, plan: EvaluationPlan) -> None:
    """Answers what is missing of ``model``'s records, and writes its figures."""
    settings = settings_of(model, plan)
    with ExitStack() as parts:
        directory = ModelDirectory(plan.out / model.name, settings, force=plan.force)
        parts.callback(directory.close)
        tasks = _make_tasks(model, plan, directory.path, parts)
        missing = sum(len(task.records.missing) for task in tasks)
        total = sum(len(task.prompts) for task in tasks)
        logger.info("%s: %d of %d problems are to be answered", model.name, missing, total)
        if missing:
            _answer(model, plan, tasks, directory.path)
        figures = {task.benchmark.name: describe_benchmark(task.records.records, plan.ks) for task in tasks}
        write_model_summary(directory.path, model, settings, figures)


def _make_tasks(model: Model, plan: EvaluationPlan, directory: Path, parts: ExitStack) -> list[Task]:
    tokenizer = tokenizer_of(model, plan.data.template)
    tasks = []
    for benchmark in plan.benchmarks:
        data = replace(plan.data, source=str(problem_file(benchmark, plan.out / "problems")))
        data = replace(data, rewards={benchmark.reward or plan.reward: 1.0})
        if benchmark.file is None or benchmark.read is not None:
            answer_field = None if benchmark.reward == CODE else "answer"
            data = replace(data, problem_field="problem", answer_field=answer_field)
        prompts = load_prompts(data, tokenizer).prompts
        records = BenchmarkRecords(directory / f"{benchmark.stem}.jsonl", prompts, samples=plan.sampling.samples_per_prompt)
        parts.callback(records.close)
        tasks.append(Task(benchmark, prompts, records))
    return tasks


def _answer(model: Model, plan: EvaluationPlan, tasks: Sequence[Task], directory: Path) -> None:
    with ExitStack() as parts:
        path = parts.enter_context(hugging_face_directory(model, directory))
        limit = plan.rollout.max_model_len or model.max_length
        longest = max(len(prompt.token_ids) for task in tasks for prompt in task.prompts)
        needed = min(limit or ANY_LENGTH, longest + plan.sampling.max_tokens)  # a KV cache for more may not fit
        rollout = replace(plan.rollout, max_model_len=needed)
        engine = make_engine(
            rollout,
            model_path=str(path),
            device=plan.device,
            worker_extension=None,
            nodes=own_nodes(rollout),
            logs=directory / "logs",
        )
        parts.callback(engine.close)
        scorer = RewardScorer(plan.rewards, max_tokens=plan.sampling.max_tokens)
        parts.callback(scorer.close)
        run_tasks(tasks, engine, scorer, sampling=plan.sampling, max_length=limit, chunk=plan.chunk)
        stats = scorer.pool.stats
        failed = stats.timeouts + stats.crashes
        if failed or stats.errors:
            logger.warning("scored 0 because scoring took too long or crashed: %d; because of errors: %s", failed, stats.errors)


def evaluate(options: argparse.Namespace) -> None:
    """Everything that ``pmpo-evaluate`` was asked for; the table goes to standard output.

    Raises:
        ConfigError: an option is wrong; names it.
    """
    models = find_models(options.models, options.hf)
    plan = make_plan(options)
    close_on_interrupt()
    for model in models:
        evaluate_model(model, plan)
    print(write_summary(plan.out), end="")
    logger.info("records and summary.json: %s", plan.out)
