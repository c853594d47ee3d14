"""What the processes of `test_model` run: Megatron-Core, with Transformer Engine's layers and with the project's own."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pmpo_megatron.checkpoint.index import INDEX_FILE, read_index
from pmpo_megatron.hf.mapping import local_name

# By which Megatron reduces gradients, and what it takes where a parameter has no such attribute.
MARKS = {"tensor_model_parallel": False, "sequence_parallel": False, "allreduce": True}


def policies(engine: str, paths: dict[str, str], layout: dict[str, Any], out: str) -> dict[str, dict[str, dict]]:
    """By model and kind of layers (transformer_engine, local), what this rank holds of it, and what a checkpoint of it is.

    Args:
        engine: the directory of Transformer Engine's Python part.
        out: an empty directory, for checkpoints.
    """
    _load_transformer_engine(engine)
    from pmpo_megatron.checkpoint.store import load_sharded
    from pmpo_megatron.model.policy import ModelConfig, Policy
    from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down

    parallel = ParallelConfig(**layout)
    state = initialize(parallel, device="cpu")
    told: dict[str, dict[str, dict]] = {}
    for name, path in paths.items():
        models = [ModelConfig(path=path, dtype="bfloat16", layers=layers) for layers in ("transformer_engine", "local")]
        pair = [Policy.build(model, None, parallel, state) for model in models]
        told[name] = {model.layers: _described(policy) for model, policy in zip(models, pair, strict=True)}
        for model, saved, other in zip(models, pair, reversed(pair), strict=True):
            checkpoint = _save(saved, Path(out) / name / model.layers)
            with torch.no_grad():
                for _, parameter in other.named_parameters():
                    parameter.zero_()
            load_sharded(other, checkpoint)
            told[name][model.layers] |= {"stored": _stored(checkpoint), "read by the others": _values(other)}
    shut_down()
    return told


def _load_transformer_engine(directory: str) -> None:
    """And says that it is here, as it would be on a GPU."""
    sys.path.append(directory)
    from pmpo_megatron import parallel  # noqa: F401  before anything of Megatron
    from pmpo_megatron.model import architecture
    from tests.emulation import compiled_part  # noqa: F401

    architecture.transformer_engine_available = lambda: True


def _described(policy: Any) -> dict[str, Any]:
    return {
        "layers": sorted({type(module).__name__ for chunk in policy.modules for module in chunk.modules()}),
        "marks": {
            local_name(name): [getattr(parameter, mark, absent) for mark, absent in MARKS.items()]
            for name, parameter in policy.named_parameters()
        },
        "values": _values(policy),
    }


def _values(policy: Any) -> dict[str, Any]:
    return {local_name(name): parameter.detach().float().numpy().copy() for name, parameter in policy.named_parameters()}


def _save(policy: Any, directory: Path) -> Path:
    """A checkpoint of ``policy`` in a subdirectory of ``directory``, as a run writes it."""
    from pmpo_megatron.checkpoint.save import Save
    from pmpo_megatron.parallel.collectives import barrier

    save = Save(policy, directory, 0, background=False)
    (save.partial / "megatron").mkdir(parents=True, exist_ok=True)
    barrier(policy.state, "the directory of a checkpoint")
    save.start()
    assert (problem := save.finish().problem) is None, problem
    barrier(policy.state, "a checkpoint")
    return save.partial / "megatron"


def _stored(checkpoint: Path) -> dict[str, list[int]]:
    """The sizes of all tensors in ``checkpoint``, by key."""
    described = read_index(checkpoint / INDEX_FILE).state_dict_metadata
    return {key: list(entry.size) for key, entry in described.items() if hasattr(entry, "size")}


def transformer_configs(engine: str, model: str, layouts: list[dict[str, Any]]) -> list[str]:
    """Of the published ``model`` on each of ``layouts`` with each kind of recomputation, on GPUs: what Megatron objects to."""
    _load_transformer_engine(engine)
    from pmpo_megatron.hf.known_models import known_shape
    from pmpo_megatron.model.architecture import transformer_config
    from pmpo_megatron.parallel.state import ParallelConfig

    problems = []
    for layout in layouts:
        parallel = ParallelConfig(**layout)
        state = SimpleNamespace(config=parallel, device=torch.device("cuda"), pp_size=parallel.pipeline)
        for recompute in ("none", "selective", "full"):
            try:
                transformer_config(known_shape(model), state, dtype=torch.bfloat16, recompute=recompute, fused=True)
            except Exception as error:
                problems.append(f"{layout} with recompute {recompute}: {type(error).__name__}: {error}")
    return problems
