"""Which prompts a round takes: seeded, without replacement within an epoch, resumable at any position."""

from __future__ import annotations

from typing import Any

import numpy as np

from pmpo_megatron.errors import ConfigError, DataError
from pmpo_megatron.types import Integers


class PromptSampler:
    """Goes through ``num_prompts`` prompts in an order that depends on seed and epoch alone.

    The position is two numbers, so a run resumes in the middle of an epoch, and the order of an epoch never depends on
    how many were taken at a time.
    """

    def __init__(self, num_prompts: int, seed: int) -> None:
        if num_prompts < 1:
            raise ConfigError("data", "no prompt is left to train on")
        self.num_prompts, self.seed = num_prompts, seed
        self.epoch = self.position = 0
        self._order = self._shuffle()

    def next(self, count: int) -> list[int]:
        """The next ``count`` prompt indices; a new epoch begins where the last one ends."""
        indices: list[int] = []
        while len(indices) < count:
            if self.position == self.num_prompts:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffle()
            taken = self._order[self.position : self.position + count - len(indices)]
            indices += taken.tolist()
            self.position += len(taken)
        return indices

    def state(self) -> dict[str, Any]:
        """What `restore` needs; JSON."""
        return {"num_prompts": self.num_prompts, "seed": self.seed, "epoch": self.epoch, "position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a `state`.

        Raises:
            DataError: it belongs to another number of prompts or another seed, so the order would silently differ.
        """
        for name in ("num_prompts", "seed"):
            if state[name] != getattr(self, name):
                raise DataError(
                    f"the checkpoint's sampler has {name} = {state[name]}, this run {getattr(self, name)}: data or seed "
                    "changed. Use the same, or start in a new run directory"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._shuffle()

    def _shuffle(self) -> Integers:
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.num_prompts)
