"""Everything about a run that can be checked before any process group, engine or GPU exists."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from pmpo_megatron.checkpoint import files
from pmpo_megatron.checkpoint.space import checkpoint_bytes, describe_bytes
from pmpo_megatron.data.generated import TASKS
from pmpo_megatron.data.prompts import DataConfig, PromptSet, check_rows, load_prompts
from pmpo_megatron.data.tokenizer import load_tokenizer
from pmpo_megatron.errors import ConfigError, MappingError, PmpoError
from pmpo_megatron.hf.known_models import model_shape
from pmpo_megatron.hf.mapping import WeightMapping
from pmpo_megatron.hf.safetensors import SafetensorsReader
from pmpo_megatron.hf.shape import ModelShape, read_shape
from pmpo_megatron.model.architecture import check_layout, expects_fused
from pmpo_megatron.parallel.shards import sequence_multiple
from pmpo_megatron.rewards.functions import check_functions
from pmpo_megatron.rollout.episodes import find_episode
from pmpo_megatron.rollout.remote_process import own_nodes
from pmpo_megatron.training.run_config import RunConfig
from pmpo_megatron.units import round_up

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class CheckedRun:
    """What is known of a run whose configuration is right.

    Attributes:
        lines: that describe it.
        prompts: what was read, by the section of the configuration that names it: ``data``, ``evaluation.data``. A Hugging
            Face data set is not opened, and a dry run without the model has no tokenizer.
    """

    lines: list[str]
    prompts: dict[str, PromptSet]


def check_run(config: RunConfig, world_size: int, *, dry_run: bool = False) -> CheckedRun:
    """Checks files, layout, batch arithmetic and lengths.

    Args:
        dry_run: a published model need not be there; its name is enough.

    Raises:
        PmpoError: something is wrong; the message names the field and what would be right.
    """
    if world_size < 1:
        raise ConfigError("--world-size", f"{world_size} must be at least 1")
    data_parallel = _in_section("parallel", lambda: config.parallel.data_parallel_size(world_size))
    shape, weights = _check_model(config.model.path, dry_run=dry_run)
    check_layout(shape, config.parallel)
    check_lengths(config, shape)
    check_experts(config, shape)
    _check_attention(config)
    on_gpu = _on_gpu(config) or (dry_run and config.run.device == "auto")
    _in_section("rollout", lambda: config.rollout.check_device("cuda" if on_gpu else "cpu"))
    _check_objective(config)
    check_functions(config.reward_functions(), config.rewards.code)
    if config.episode.function is not None:
        find_episode(config.episode.function)
    lines = [
        f"{_describe_model(config, shape)}; {weights}",
        _describe_layout(config, world_size, data_parallel),
        _describe_batch(config),
    ]
    tokenizer = load_tokenizer(config.model.path) if not dry_run or _has_weights(config.model.path) else None
    prompts: dict[str, PromptSet] = {}
    for name, data in (("data", config.data), ("evaluation.data", config.evaluation.data)):
        if data is not None:
            lines.append(_check_data(name, data, tokenizer, shape, prompts))
    if config.rollout.replay_from is not None and not Path(config.rollout.replay_from).is_file():
        raise ConfigError("rollout.replay_from", f"{config.rollout.replay_from}: no such file")
    _in_section("rollout", lambda: own_nodes(config.rollout))
    if config.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError("rollout.engine", "vllm is not installed; see the README for the requirements")
    if config.monitor.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError("monitor.wandb_project", "needs the package wandb, which is not installed: pip install wandb")
    _check_directory(Path(config.run.directory))
    if config.checkpoint.keep_best and config.evaluation.data is None:
        raise ConfigError("checkpoint.keep_best", "needs evaluation.data: the best are those of the highest held-out accuracy")
    if not dry_run:
        _check_space(config, shape)
    return CheckedRun(lines, prompts)


def _check_model(path: str, *, dry_run: bool) -> tuple[ModelShape, str]:
    """The model's shape, and what is known of its weights from their files' headers."""
    try:
        shape = model_shape(path) if dry_run else read_shape(path)
        if dry_run and not _has_weights(path):
            return shape, "its weights are not here"
        reader, mapping = SafetensorsReader(path), WeightMapping(shape)
        mapping.check_names(reader.names, where=path)
        reader.check(mapping.hf_shapes)
    except MappingError as error:
        raise ConfigError("model.path", str(error)) from None
    return shape, f"{len(reader.names)} tensors, by their headers; values are checked while they are loaded"


def _has_weights(path: str) -> bool:
    """Whether the model is there: a dry run plans for a published one by its name or its config.json alone."""
    return any(any(Path(path).glob(pattern)) for pattern in ("*.safetensors*", "*.bin"))


def _check_directory(directory: Path) -> None:
    """Whether a run may write there; makes nothing."""
    present = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not present.is_dir():
        raise ConfigError("run.directory", f"{directory}: {present} is a file, not a directory")
    if not os.access(present, os.W_OK | os.X_OK):
        raise ConfigError("run.directory", f"{directory}: {present} cannot be written to")


def _check_space(config: RunConfig, shape: ModelShape) -> None:
    """Whether the first checkpoint of a run has room; where there are some, a save that has none is left out."""
    root = Path(config.run.directory) / "checkpoints"
    if files.list_checkpoints(root):
        return
    dtype = config.model.torch_dtype(torch.device("cuda" if _on_gpu(config) else "cpu"))
    needed = checkpoint_bytes(WeightMapping(shape), dtype, distributed=config.optimizer.distributed)
    free = files.free_bytes(root)
    if needed > free:
        raise ConfigError(
            "run.directory",
            f"{root}: a checkpoint needs {describe_bytes(needed)}, {describe_bytes(free)} are free; choose a larger disk",
        )


def _on_gpu(config: RunConfig) -> bool:
    return config.run.device == "cuda" or (config.run.device == "auto" and torch.cuda.is_available())


def _in_section(section: str, call: Callable[[], T]) -> T:
    """``call()``, whose ConfigError names a field of ``section``."""
    try:
        return call()
    except ConfigError as error:
        raise error.within(section) from None


def _check_attention(config: RunConfig) -> None:
    """Transformer Engine 2.20 has no backend for float32 that divides a sequence over ranks."""
    float32 = config.model.dtype == "float32"
    if _on_gpu(config) and float32 and config.parallel.context > 1 and expects_fused(config.model.layers):
        raise ConfigError(
            "model.dtype",
            f"float32 with parallel.context = {config.parallel.context} has no attention in Transformer Engine; use bfloat16, "
            "or model.layers=local",
        )


def check_experts(config: RunConfig, shape: ModelShape) -> None:
    """Raises ConfigError for settings of mixtures where the model is none, and for an optimizer that has no checkpoint
    which loads on another layout of the experts."""
    used = {
        "round.routing_replay": config.round.routing_replay != "off",
        "objective.balance_coefficient": config.objective.balance_coefficient > 0,
        "rollout.expert_parallel": config.rollout.expert_parallel,
    }
    for name in (name for name, is_used in used.items() if is_used and shape.experts is None):
        raise ConfigError(name, f"has no effect: {config.model.path} has no mixture of experts")
    if config.parallel.expert > 1 and not config.optimizer.distributed:
        raise ConfigError("optimizer.distributed", f"must be true with parallel.expert = {config.parallel.expert}")


def check_lengths(config: RunConfig, shape: ModelShape) -> None:
    """Raises ConfigError if the longest prompt and response fit no micro-batch, or are more than engine or model take."""
    multiple = sequence_multiple(config.parallel)
    longest = config.data.max_prompt_tokens + config.sampling.max_tokens
    padded = round_up(longest, multiple)
    if padded > config.batch.max_tokens_per_micro_batch:
        raise ConfigError(
            "batch.max_tokens_per_micro_batch",
            f"{config.batch.max_tokens_per_micro_batch} is less than the longest trajectory: data.max_prompt_tokens "
            f"{config.data.max_prompt_tokens} + sampling.max_tokens {config.sampling.max_tokens}, padded to {padded}",
        )
    limit = config.rollout.max_model_len or shape.max_position_embeddings
    if limit is not None and longest > limit:
        name = "rollout.max_model_len" if config.rollout.max_model_len else f"{config.model.path}: max_position_embeddings"
        raise ConfigError(
            "sampling.max_tokens",
            f"prompt {config.data.max_prompt_tokens} + response {config.sampling.max_tokens} = {longest} tokens, above {name} "
            f"= {limit}",
        )


def _check_objective(config: RunConfig) -> None:
    if config.sampling.temperature == 0:
        raise ConfigError("sampling.temperature", "0 gives every response of a group the same text: nothing to learn from")
    if config.sampling.samples_per_prompt < 2:
        raise ConfigError("sampling.samples_per_prompt", "must be at least 2: an advantage compares responses to one prompt")
    if config.sampling.top_p < 1 or config.sampling.top_k:
        logger.warning("sampling.top_p and top_k: the engine's log-probs are of the cut distribution, the trainer's are not")
    if config.rollout.quantization != "none" and config.objective.importance == config.round.rejection == "none":
        logger.warning("rollout.quantization without objective.importance: the engine's rounding is not corrected for")
    if config.round.mode != "synchronous" and config.objective.importance == "none":
        logger.warning("round.mode %s without objective.importance: older rollouts are not corrected for", config.round.mode)


def _check_data(name: str, data: DataConfig, tokenizer: Any | None, shape: ModelShape, prompts: dict[str, PromptSet]) -> str:
    """One line about the sources; what is on this machine is read, into ``prompts``."""
    parts = data.parts().values()
    if elsewhere := [f"{part.source} [{part.split}]" for part in parts if not _is_here(str(part.source))]:
        kind = "a Hugging Face data set" if len(elsewhere) == 1 else "Hugging Face data sets"
        return f"{name}: {', '.join(elsewhere)}, {kind}: not opened before the start"
    text = f"{name}: {', '.join(dict.fromkeys(str(part.source) for part in parts))}"
    try:
        if tokenizer is None:
            return f"{text}, {check_rows(data)} problems; not tokenised, because the model is not here"
        read = prompts[name] = load_prompts(data, tokenizer, vocab_size=shape.vocab_size)
    except ConfigError as error:
        if not error.field.startswith("data."):
            raise
        raise ConfigError(f"{name}.{error.field.removeprefix('data.')}", error.problem) from None
    except PmpoError as error:
        raise ConfigError(f"{name}.source", str(error)) from None
    left_out = f", {read.too_long} longer ones left out" if read.too_long else ""
    return f"{text}, {len(read)} problems{left_out}"


def _is_here(source: str) -> bool:
    return source in TASKS or Path(source).suffix in (".jsonl", ".json", ".parquet") or Path(source).exists()


def _describe_model(config: RunConfig, shape: ModelShape) -> str:
    return (
        f"model: {config.model.path}, {shape.architecture}, {shape.num_layers} layers, hidden {shape.hidden_size}, "
        f"vocabulary {shape.vocab_size}"
    )


def _describe_layout(config: RunConfig, world_size: int, data_parallel: int) -> str:
    parallel = config.parallel
    copies = parallel.expert_data_parallel_size(world_size)
    experts = f", experts over {parallel.expert} * {parallel.expert_tensor_size} in {copies} copies"
    return (
        f"layout: {world_size} processes = tensor {parallel.tensor} * pipeline {parallel.pipeline} * context "
        f"{parallel.context} * data {data_parallel}{experts if parallel.expert > 1 else ''}; rollouts: "
        f"{_describe_rollouts(config)}"
    )


def _describe_rollouts(config: RunConfig) -> str:
    rollout = config.rollout
    if rollout.replay_from is not None:
        return f"from {rollout.replay_from}"
    where = {"first": "", "all": " on every node", "own": f" on each of {', '.join(rollout.hosts)}"}[rollout.nodes]
    return f"{rollout.engines} vLLM{'s' * (rollout.engines > 1)}{where}, tensor {rollout.tensor_parallel}"


def _describe_batch(config: RunConfig) -> str:
    batch = config.batch
    trajectories = batch.prompts_per_round * config.sampling.samples_per_prompt
    return (
        f"batch: {config.run.rounds} rounds of {batch.prompts_per_round} prompts * {config.sampling.samples_per_prompt} "
        f"responses = {trajectories} trajectories, {batch.steps_per_round} optimizer steps of "
        f"{trajectories // batch.steps_per_round} each; objective: rule {config.objective.rule}, clip "
        f"{config.objective.clip_level} [{config.objective.log_bounds[0]:g}, {config.objective.log_bounds[1]:g}] in log space"
    )
