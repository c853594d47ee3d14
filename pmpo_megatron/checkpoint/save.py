"""One checkpoint being written: planned and copied at once, written now or by a thread, finished by all ranks together."""

from __future__ import annotations

import inspect
import queue
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pmpo_megatron.checkpoint import files
from pmpo_megatron.checkpoint.optimizer_state import FORMAT, state_to_read
from pmpo_megatron.errors import RankFailure
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.parallel.liveness import naming_ranks
from pmpo_megatron.parallel.random_state import get_random_state

# The only optimizer format that loads on any other layout (megatron-core 0.16 and 0.19), gathered in the host's memory: by
# default it is gathered on every GPU, which takes twice the float32 size of the rank's part of the model there.
OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": FORMAT,
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,  # or the names would say how experts were spread
}


@dataclass
class Part:
    """One rank's share of a checkpoint: what went wrong, or its files' sizes and checksums by name."""

    problem: str | None = None
    files: dict[str, list[int]] = field(default_factory=dict)


class Save:
    """Collective: all ranks make one, `start` it and `finish` it. Between these, nothing here communicates.

    Args:
        final: the checkpoint's directory when it is complete; until then it has another name.
        background: write in a thread, from a copy of the state as it is at `start`.
    """

    def __init__(self, policy: Policy, final: Path, round_index: int, *, background: bool) -> None:
        self.policy, self.final, self.round_index, self.background = policy, final, round_index, background
        self.partial = final.with_name(final.name + files.PARTIAL)
        self._part = Part()
        self._request: Any = None  # Megatron's AsyncRequest
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Plans who writes what, copies the state to this rank's memory, and writes it, or begins to."""
        rank = self.policy.state.rank
        try:
            with naming_ranks("planning a checkpoint"):
                self._request = plan(self.policy, self.partial / "megatron", copy=self.background)
            torch.save(random_states(), self.partial / f"random-{rank:05d}.pt")
            arguments = list(self._request.async_fn_args)
            if self._request.preload_fn is not None:
                arguments[1] = self._request.preload_fn()  # from the GPU to this process's memory
        except RankFailure:
            raise
        except Exception as error:  # dist_checkpointing raises classes of its own, and what its writers raised
            self._part.problem = f"rank {rank}: {type(error).__name__}: {error}"
            return
        if self.background:
            self._thread = threading.Thread(target=self._write, args=(arguments,), name="checkpoint")
            self._thread.start()
        else:
            self._write(arguments)

    def finish(self) -> Part:
        """Waits for this rank's files; then Megatron gathers what was written where into the checkpoint's metadata."""
        if self._thread is not None:
            self._thread.join()
        try:
            with naming_ranks("finishing a checkpoint"):
                if self._request is not None:
                    for finalize in self._request.finalize_fns:
                        finalize()
        except BaseException as error:  # DCP's CheckpointException is no Exception
            if isinstance(error, (KeyboardInterrupt, RankFailure)):
                raise
            self._part.problem = self._part.problem or f"rank {self.policy.state.rank}: {type(error).__name__}: {error}"
        return self._part

    def _write(self, arguments: list[Any]) -> None:
        """Writes this rank's files and takes their checksums."""
        rank = self.policy.state.rank
        try:
            if self._request.async_fn is not None:
                self._request.async_fn(*arguments, **self._request.async_fn_kwargs)
            mine = [self.partial / f"random-{rank:05d}.pt", *(self.partial / "megatron").glob(f"__{rank}_*")]
            self._part.files = files.describe_files(self.partial, mine)
        except Exception as error:
            self._part.problem = f"rank {rank}: {type(error).__name__}: {error}"


def plan(policy: Policy, directory: Path, *, copy: bool) -> Any:
    """Megatron's AsyncRequest for ``policy`` into ``directory``, which exists and is empty.

    Args:
        copy: of tensors that training would change before they are written. On GPU the request's own preload copies.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace

    _use_plain_results_queue()
    state = sharded_state(policy, is_loading=False)
    if copy and policy.state.device.type == "cpu":
        dict_list_map_inplace(_with_copied_data, state)
    return dist_checkpointing.save(state, str(directory), async_sharded_save=True, **_builtin_writer(dist_checkpointing.save))


def _builtin_writer(save: Callable) -> dict[str, str]:
    """Megatron-Core 0.19 would by default have another package write; what 0.16 always does is called ``mcore`` there."""
    return {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(save).parameters else {}


def _with_copied_data(leaf: Any) -> Any:
    if isinstance(getattr(leaf, "data", None), torch.Tensor) and not isinstance(leaf, torch.Tensor):
        leaf.data = leaf.data.detach().clone()
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _use_plain_results_queue() -> None:
    """Spares every rank a multiprocessing Manager, 4 to 17 s at the first save.

    Megatron-Core 0.16 and 0.19 (dist_checkpointing/strategies/filesystem_async.py, _get_write_results_queue) spawn one for
    results that here never leave the process. To be deleted when they no longer do.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's, PyTorch's and Megatron's generators on this rank."""
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": get_random_state()}


def sharded_state(policy: Policy, *, is_loading: bool) -> dict[str, Any]:
    """What dist_checkpointing saves or fills: model chunks, optimizer, schedule."""
    policy.memory.wait()
    policy.gather.finish()
    metadata = dict(OPTIMIZER_FORMAT)
    chunks = {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(policy.modules)}
    state: dict[str, Any] = dict(chunks)
    if policy.scheduler is not None:
        # One chunk's dictionary under the bare name "model" is what the optimizer looks for.
        model_state = {key: value for chunk in chunks.values() for key, value in chunk.items()} if len(chunks) == 1 else chunks
        if is_loading and policy.optimizer.config.use_distributed_optimizer:
            state["optimizer_states"] = state_to_read(policy.optimizer, model_state)
        else:
            state["optimizer"] = policy.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
        state["schedule"] = policy.scheduler.state_dict()
    return state
