"""Which prompts a round takes: seeded, without replacement within an epoch, resumable at any position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pmpo_megatron.errors import ConfigError, DataError
from pmpo_megatron.types import Integers, Prompt


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


class MixedSampler:
    """Draws from several sources, each in an order of its own as `PromptSampler` has it.

    The next prompt is always of the source that is furthest behind its share, so that every round has them in like parts, and
    the order depends on seed and weights alone, not on how many were taken at a time.

    Args:
        sizes: prompts of each source, which follow one another in the set.
        weights: of each source; shares are in proportion to them.
    """

    def __init__(self, sizes: Mapping[str, int], weights: Mapping[str, float], seed: int) -> None:
        self.seed, total = seed, sum(weights.values())
        self.shares = {name: weights[name] / total for name in sizes}
        self.sources = {name: PromptSampler(size, seed) for name, size in sizes.items()}
        self.offsets = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
        self.num_prompts = sum(sizes.values())

    def next(self, count: int) -> list[int]:
        """The next ``count`` prompt indices; each source begins anew where its prompts end."""
        drawn = {name: source.epoch * source.num_prompts + source.position for name, source in self.sources.items()}
        indices: list[int] = []
        for number in range(sum(drawn.values()) + 1, sum(drawn.values()) + 1 + count):
            behind = {name: share * number - drawn[name] for name, share in self.shares.items()}
            name = max(behind, key=lambda source: behind[source])
            drawn[name] += 1
            indices.append(self.offsets[name] + self.sources[name].next(1)[0])
        return indices

    def state(self) -> dict[str, Any]:
        """What `restore` needs; JSON. ``position`` counts all draws, and ``epoch`` none."""
        states = {name: source.state() for name, source in self.sources.items()}
        position = sum(state["epoch"] * state["num_prompts"] + state["position"] for state in states.values())
        return {"num_prompts": self.num_prompts, "seed": self.seed, "epoch": 0, "position": position} | {
            "sources": states,
            "shares": self.shares,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to a `state`.

        Raises:
            DataError: it belongs to other sources or weights, another number of prompts or another seed.
        """
        if (shares := state.get("shares", {})) != self.shares:
            had, has = (", ".join(f"{name} ({share:.3g})" for name, share in each.items()) for each in (shares, self.shares))
            raise DataError(
                f"the checkpoint's sampler has the sources {had or '(one alone)'}, this run {has}: data changed. "
                "Use the same, or start in a new run directory"
            )
        for name, source in self.sources.items():
            source.restore(state["sources"][name])


Sampler = PromptSampler | MixedSampler


def make_sampler(prompts: Sequence[Prompt], weights: Mapping[str, float], seed: int) -> Sampler:
    """The sampler of ``prompts``, source after source, in the shares of ``weights``."""
    sizes = Counter(prompt.source for prompt in prompts)
    return MixedSampler(sizes, weights, seed) if len(sizes) > 1 else PromptSampler(len(prompts), seed)
