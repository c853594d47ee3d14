"""Saving and resuming a run: model and optimizer by Megatron's dist_checkpointing, random states, and the run's progress."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pmpo_megatron.checkpoint import files
from pmpo_megatron.checkpoint.config import CheckpointConfig
from pmpo_megatron.checkpoint.index import EXTRA_STATE, INDEX_FILE, read_index
from pmpo_megatron.checkpoint.optimizer_state import load_state
from pmpo_megatron.checkpoint.save import Save, sharded_state
from pmpo_megatron.checkpoint.space import bytes_of, describe_bytes
from pmpo_megatron.errors import CheckpointError
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.parallel.collectives import any_rank, barrier, broadcast_object, gather_objects
from pmpo_megatron.parallel.liveness import naming_ranks
from pmpo_megatron.parallel.random_state import set_random_state
from pmpo_megatron.parallel.state import ParallelState

logger = logging.getLogger(__name__)
FULL_BYTES = 16 * 2**20  # left free, with the unfinished checkpoint still there: the disk was the reason


class CheckpointStore:
    """The checkpoints of one run, ``root/round-00000010`` and so on. All methods are collective.

    A checkpoint is written into a directory with another name, checksummed, and renamed when it is complete; so a kill at
    any moment leaves the earlier ones as they were. It loads on any other parallel layout.
    """

    def __init__(self, root: str | Path, config: CheckpointConfig, policy: Policy) -> None:
        self.root, self.config, self.policy = Path(root), config, policy
        self.state: ParallelState = policy.state
        self._saved: int | None = None
        self._pending: Save | None = None
        self._damaged: set[Path] = set()  # newer than what was loaded
        self._accuracy: dict[int, float] = {}

    def due(self, round_index: int) -> bool:
        return round_index % self.config.every_rounds == 0

    def save(
        self,
        round_index: int,
        progress: dict[str, Any],
        *,
        required: bool = False,
        accuracy: Mapping[int, float] | None = None,
    ) -> bool:
        """Writes the checkpoint after ``round_index`` rounds; False if that failed, which is logged. Nothing before the
        first update of the policy.

        Asynchronous: returns when the state is copied, and `poll` or `wait` publishes what a thread writes meanwhile.

        Args:
            progress: the run's own state, JSON; rank 0's is written.
            required: write it now, and raise instead of returning False.
            accuracy: on held-out problems, by round: it decides which checkpoints are the best.

        Raises:
            CheckpointError: it could not be written and is ``required``. The checkpoints before it are intact.
        """
        self.wait()
        self._accuracy = dict(accuracy or {})
        if self._saved == round_index and self._is_there(round_index):
            return True
        if self.policy.scheduler is None or self.policy.scheduler.num_updates == 0:
            return True  # the policy is the checkpoint that it was made from, and Adam has no state yet
        final = files.checkpoint_path(self.root, round_index)
        background = self.config.asynchronous and not required
        save = Save(self.policy, final, round_index, background=background)
        if problem := broadcast_object(self._prepare(save, progress) if self.state.is_main else None, self.state):
            return self._failed(save, problem, required)
        save.start()
        if background:
            self._pending = save
            return True
        return self._complete(save, required)

    def poll(self) -> None:
        """Publishes a checkpoint that was being written in the background, if all ranks have done their part."""
        if self._pending is not None and not any_rank(self._pending.running, self.state):
            self.wait()

    def wait(self) -> None:
        """Waits for a checkpoint that is being written in the background, and publishes it."""
        if self._pending is not None:
            save, self._pending = self._pending, None
            self._complete(save, required=False)

    def _is_there(self, round_index: int) -> bool:
        """Whether nobody has removed the checkpoint of that round."""
        return broadcast_object(files.checkpoint_path(self.root, round_index) in files.list_checkpoints(self.root), self.state)

    def _prepare(self, save: Save, progress: dict[str, Any]) -> str | None:
        """Rank 0: an empty directory with the run's progress; what is wrong, if anything."""
        try:
            if self._saved is not None and not self.root.is_dir():
                logger.warning("%s was removed while the run goes on; it is made again", self.root)
            shutil.rmtree(save.partial, ignore_errors=True)
            needed, free = bytes_of(self.policy), files.free_bytes(self.root)
            if needed > free:
                return f"it needs {describe_bytes(needed)} and {describe_bytes(free)} are free"
            (save.partial / "megatron").mkdir(parents=True)
            (save.partial / files.PROGRESS).write_text(json.dumps(progress))
        except OSError as error:
            return str(error)
        return None

    def _complete(self, save: Save, required: bool) -> bool:
        """Waits for every rank's files, and publishes them with their checksums."""
        parts = gather_objects(save.finish(), self.state)
        problem = next((part.problem for part in parts if part.problem), None)
        if problem is None and self.state.is_main:
            problem = self._publish(save, {name: entry for part in parts for name, entry in part.files.items()})
        if problem is not None and self.state.is_main:
            problem = self._explain(problem)
        if problem := broadcast_object(problem, self.state):
            return self._failed(save, problem, required)
        self._saved = save.round_index
        return True

    def _publish(self, save: Save, described: dict[str, list[int]]) -> str | None:
        try:
            rest = [p for p in files.data_files(save.partial) if str(p.relative_to(save.partial)) not in described]
            files.write_manifest(save.partial, described | files.describe_files(save.partial, rest))
            files.publish(save.partial, save.final)
            self._damaged.discard(save.final)
            files.remove_old(self.root, self.config, accuracy=self._accuracy, damaged=self._damaged)
        except OSError as error:
            return str(error)
        return None

    def _explain(self, problem: str) -> str:
        """``problem`` in one line; PyTorch's writer does not say that the disk is full, so we look."""
        lines = [line for line in problem.splitlines() if line.strip(" )")]
        free = files.free_bytes(self.root)
        full = f"the disk is full, {free / 2**20:.0f} MiB are free: " if free < FULL_BYTES else ""
        return full + " ... ".join(dict.fromkeys((lines[0], lines[-1])))

    def _failed(self, save: Save, problem: str, required: bool) -> bool:
        others = bool(files.list_checkpoints(self.root))
        before = "the checkpoints before it are intact" if others else "there is none before it"
        message = f"{save.final}: not saved ({problem}); {before}"
        if self.state.is_main:
            shutil.rmtree(save.partial, ignore_errors=True)
            logger.log(logging.ERROR if required or not others else logging.WARNING, "%s", message)
        if required:
            raise CheckpointError(message)
        return False

    def set_aside(self) -> None:
        """Moves what an earlier run left in ``root`` into ``root``/earlier, for a run that starts anew in its directory."""
        if self.state.is_main and (earlier := files.list_checkpoints(self.root)):
            logger.info("%d checkpoints of an earlier run are now in %s", len(earlier), files.set_aside(self.root, earlier))
        barrier(self.state, "the checkpoints of an earlier run")

    def load_latest(self, check: Callable[[dict[str, Any]], object] | None = None) -> dict[str, Any] | None:
        """Restores the newest whole checkpoint and returns its progress; None if there is none.

        A damaged one is reported and the one before it used.

        Args:
            check: raises CheckpointError for a progress that the run cannot go on from.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged.
        """
        candidates = broadcast_object([str(p) for p in files.list_checkpoints(self.root)], self.state)
        for candidate in map(Path, candidates):
            damage = self._find_damage(candidate, check)
            if damage is None:
                self._load(candidate)
                self._saved = files.round_of(candidate)
                return broadcast_object(files.read_progress(candidate) if self.state.is_main else None, self.state)
            self._damaged.add(candidate)
            if self.state.is_main:
                logger.error("%s: %s; trying the checkpoint before it", candidate, damage)
        if candidates:
            raise CheckpointError(f"{self.root}: every checkpoint is damaged; move them away to start anew")
        return None

    def _find_damage(self, directory: Path, check: Callable[[dict[str, Any]], object] | None) -> str | None:
        """Every rank checks its share of the files; rank 0 also what the run wrote about itself."""
        try:
            manifest = files.read_manifest(directory)
            names = sorted(manifest)[self.state.rank :: self.state.world_size]
            mine = files.find_damage(directory, {name: manifest[name] for name in names})
            if mine is None and self.state.is_main:
                progress = files.read_progress(directory)
                read_index(directory / "megatron" / INDEX_FILE)
                if check is not None:
                    check(progress)
        except CheckpointError as error:
            mine = str(error)
        return next((damage for damage in gather_objects(mine, self.state) if damage), None)

    def _load(self, directory: Path) -> None:
        load_sharded(self.policy, directory / "megatron")
        saved = sorted(directory.glob("random-*.pt"))
        if len(saved) == self.state.world_size:
            self._restore_random_state(torch.load(saved[self.state.rank], weights_only=False))
        elif self.state.is_main:
            logger.info(
                "%s: saved by %d processes, now %d: random states start anew", directory, len(saved), self.state.world_size
            )

    @staticmethod
    def _restore_random_state(saved: dict[str, Any]) -> None:
        random.setstate(saved["python"])
        np.random.set_state(saved["numpy"])
        set_random_state(saved["torch"])


def load_sharded(policy: Policy, directory: Path) -> None:
    """Fills ``policy`` from a distributed checkpoint of the same model, saved on any layout.

    Raises:
        CheckpointError: it does not fit the model.
    """
    from megatron.core import dist_checkpointing
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException: it must be named

    problems = (KeyError, ValueError, dist_checkpointing.core.CheckpointingException, CheckpointException)
    wanted = sharded_state(policy, is_loading=True)
    for index in range(len(policy.modules)):
        chunk = wanted[f"model{index}"]
        # Transformer Engine's layers have more of these objects than our own, and without float8 all are empty.
        wanted[f"model{index}"] = {name: value for name, value in chunk.items() if EXTRA_STATE not in name}
    try:
        with naming_ranks("reading a checkpoint"):
            loaded = dist_checkpointing.load(wanted, str(directory))
    except problems as error:
        raise CheckpointError(f"{directory}: does not fit this model: {error}") from error
    for index, module in enumerate(policy.modules):
        absent, unknown = module.load_state_dict(loaded[f"model{index}"], strict=False)
        absent = [name for name in absent if EXTRA_STATE not in name]
        assert not absent and not unknown, f"names of parameters: {absent} are absent, {unknown} unknown"
    if policy.scheduler is not None:
        if "optimizer_states" in loaded:
            load_state(policy.optimizer, loaded["optimizer"], loaded["optimizer_states"])
        else:
            policy.optimizer.load_state_dict(loaded["optimizer"])
        policy.scheduler.load_state_dict(loaded["schedule"])
