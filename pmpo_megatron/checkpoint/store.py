"""Saving and resuming a run: model and optimizer by Megatron's dist_checkpointing, random states, and the run's progress."""

from __future__ import annotations

import json
import logging
import queue
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pmpo_megatron.checkpoint import files
from pmpo_megatron.checkpoint.config import CheckpointConfig
from pmpo_megatron.errors import CheckpointError
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.parallel.collectives import barrier, broadcast_object, gather_objects
from pmpo_megatron.parallel.random_state import get_random_state, set_random_state
from pmpo_megatron.parallel.state import ParallelState

logger = logging.getLogger(__name__)

# The only optimizer format that loads on any other layout (megatron-core 0.16 and 0.19).
OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


class CheckpointStore:
    """The checkpoints of one run, ``root/round-00000010`` and so on. All methods are collective.

    A checkpoint is written into a directory with another name, checksummed, and renamed when it is complete; so a kill at
    any moment leaves the earlier ones as they were. It loads on any other parallel layout.
    """

    def __init__(self, root: str | Path, config: CheckpointConfig, policy: Policy) -> None:
        self.root, self.config, self.policy = Path(root), config, policy
        self.state: ParallelState = policy.state
        self._saved: int | None = None

    def due(self, round_index: int) -> bool:
        return round_index % self.config.every_rounds == 0

    def save(self, round_index: int, progress: dict[str, Any], *, required: bool = False) -> bool:
        """Writes the checkpoint after ``round_index`` rounds; False if that failed, which is logged. Nothing before the
        first update of the policy.

        Args:
            progress: the run's own state, JSON; rank 0's is written.
            required: raise instead of returning False.

        Raises:
            CheckpointError: it could not be written and is ``required``. The checkpoints before it are intact.
        """
        if self._saved == round_index:
            return True
        if self.policy.scheduler.num_updates == 0:
            return True  # the policy is the checkpoint that it was made from, and Adam has no state yet
        final = files.checkpoint_path(self.root, round_index)
        partial = final.with_name(final.name + files.PARTIAL)
        problems = [p for p in gather_objects(self._attempt(partial, progress), self.state) if p]
        if problems:
            message = f"{final}: not saved ({problems[0]}); the checkpoints before it are intact"
            if self.state.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                logger.error("%s", message)
            if required:
                raise CheckpointError(message)
            return False
        if self.state.is_main:
            files.publish(partial, final)
            files.remove_old(self.root, self.config.keep)
        barrier(self.state, "the end of a checkpoint")
        self._saved = round_index
        return True

    def set_aside(self) -> None:
        """Moves what an earlier run left in ``root`` into ``root``/earlier, for a run that starts anew in its directory."""
        if self.state.is_main and (found := files.list_checkpoints(self.root)):
            attic = self.root / "earlier" / time.strftime("%Y%m%d-%H%M%S")
            attic.mkdir(parents=True)
            for path in found:
                path.rename(attic / path.name)
            logger.info("%d checkpoints of an earlier run are now in %s", len(found), attic)
        barrier(self.state, "the checkpoints of an earlier run")

    def load_latest(self) -> dict[str, Any] | None:
        """Restores the newest whole checkpoint and returns its progress; None if there is none.

        A damaged one is reported and the one before it used.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged.
        """
        candidates = broadcast_object([str(p) for p in files.list_checkpoints(self.root)], self.state)
        for candidate in map(Path, candidates):
            damage = self._find_damage(candidate)
            if damage is None:
                self._load(candidate)
                self._saved = int(candidate.name.removeprefix(files.PREFIX))
                return json.loads((candidate / "progress.json").read_text())
            if self.state.is_main:
                logger.error("%s: %s; trying the checkpoint before it", candidate, damage)
        if candidates:
            raise CheckpointError(f"{self.root}: every checkpoint is damaged; move them away to start anew")
        return None

    def _attempt(self, partial: Path, progress: dict[str, Any]) -> str | None:
        """Writes everything into ``partial``; what went wrong on this rank."""
        try:
            if self.state.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / "megatron").mkdir(parents=True)
                (partial / "progress.json").write_text(json.dumps(progress))
            problem = None
        except OSError as error:
            problem = str(error)
        if problem := broadcast_object(problem, self.state):
            return problem
        try:
            save_sharded(self.policy, partial / "megatron")
            torch.save(self._random_state(), partial / f"random-{self.state.rank:05d}.pt")
        except Exception as error:  # dist_checkpointing raises its own classes, and OSError from writer processes as strings
            return f"rank {self.state.rank}: {type(error).__name__}: {error}"
        barrier(self.state, "a checkpoint's files")
        try:
            mine = files.data_files(partial)[self.state.rank :: self.state.world_size]
            parts = gather_objects(files.describe_files(partial, mine), self.state)
            if self.state.is_main:
                files.write_manifest(partial, {name: entry for part in parts for name, entry in part.items()})
        except OSError as error:
            return f"rank {self.state.rank}: {error}"
        return None

    def _find_damage(self, directory: Path) -> str | None:
        """Every rank checks its share of the files."""
        try:
            manifest = files.read_manifest(directory)
            names = sorted(manifest)[self.state.rank :: self.state.world_size]
            mine = files.find_damage(directory, {name: manifest[name] for name in names})
        except CheckpointError as error:
            mine = str(error)
        return next((found for found in gather_objects(mine, self.state) if found), None)

    def _load(self, directory: Path) -> None:
        load_sharded(self.policy, directory / "megatron")
        saved = sorted(directory.glob("random-*.pt"))
        if len(saved) == self.state.world_size:
            self._restore_random_state(torch.load(saved[self.state.rank], weights_only=False))
        elif self.state.is_main:
            logger.info(
                "%s: saved by %d processes, now %d: random states start anew", directory, len(saved), self.state.world_size
            )

    def _random_state(self) -> dict[str, Any]:
        return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": get_random_state()}

    def _restore_random_state(self, saved: dict[str, Any]) -> None:
        random.setstate(saved["python"])
        np.random.set_state(saved["numpy"])
        set_random_state(saved["torch"])


def sharded_state(policy: Policy, *, is_loading: bool) -> dict[str, Any]:
    """What dist_checkpointing saves or fills: model chunks, optimizer, schedule."""
    metadata = dict(OPTIMIZER_FORMAT)
    chunks = {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(policy.modules)}
    state: dict[str, Any] = dict(chunks)
    if policy.optimizer is not None:
        # One chunk's dictionary under the bare name "model" is what the optimizer looks for.
        model_state = {key: value for chunk in chunks.values() for key, value in chunk.items()} if len(chunks) == 1 else chunks
        state["optimizer"] = policy.optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
        state["schedule"] = policy.scheduler.state_dict()
    return state


def save_sharded(policy: Policy, directory: Path) -> None:
    """Megatron's distributed checkpoint of ``policy`` in ``directory``, which exists and is empty."""
    from megatron.core import dist_checkpointing

    _use_plain_results_queue()
    dist_checkpointing.save(sharded_state(policy, is_loading=False), str(directory))


def _use_plain_results_queue() -> None:
    """Spares every rank a multiprocessing Manager, 4 to 17 s at the first save.

    Megatron-Core 0.16 and 0.19 (dist_checkpointing/strategies/filesystem_async.py, _get_write_results_queue) spawn one for
    results that, in a synchronous save, never leave the process. To be deleted when they no longer do.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def load_sharded(policy: Policy, directory: Path) -> None:
    """Fills ``policy`` from a distributed checkpoint of the same model, saved on any layout.

    Raises:
        CheckpointError: it does not fit the model.
    """
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException: it must be named

    problems = (KeyError, ValueError, dist_checkpointing.core.CheckpointingException, CheckpointException)
    try:
        loaded = dist_checkpointing.load(sharded_state(policy, is_loading=True), str(directory))
    except problems as error:
        raise CheckpointError(f"{directory}: does not fit this model: {error}") from error
    for index, module in enumerate(policy.modules):
        module.load_state_dict(loaded[f"model{index}"], strict=True)
    if policy.optimizer is not None:
        policy.optimizer.load_state_dict(loaded["optimizer"])
        policy.scheduler.load_state_dict(loaded["schedule"])
