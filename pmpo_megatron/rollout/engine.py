"""What every rollout engine does. Token ids in, token ids and log-probs out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pmpo_megatron.rollout.config import SamplingConfig
from pmpo_megatron.types import Prompt, RolloutGroup


class RolloutEngine(Protocol):
    """Makes rollouts with the newest weights that were pushed to it.

    ``version`` counts weight updates. ``holds_weights`` says whether there are any to update. ``on_restart`` is called,
    with the engine, after a crashed one was started again, and has to bring its weights up to date before any token is sampled.
    ``same_host``: started by this process, beside it; ``elsewhere``: some of its workers are not, but on the run's other nodes;
    ``on_loopback``: its workers reach this process at 127.0.0.1.
    """

    version: int
    holds_weights: bool
    same_host: bool
    elsewhere: bool
    on_loopback: bool
    on_restart: Callable[[Any], None] | None

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, round_index: int) -> list[RolloutGroup]:
        """``samples_per_prompt`` responses to each prompt, in the order of ``prompts``.

        Raises:
            RolloutError: the engine failed beyond repair, or does not hold whole weights.
        """

    def collective_rpc(self, method: str, *arguments: Any) -> list[Any]:
        """Calls ``method`` of every vLLM worker's extension class; what each returned."""

    def reset_prefix_cache(self) -> None:
        """Forgets what was computed with earlier weights.

        Raises:
            RolloutError: it could not, because requests are not done.
        """

    def mark_broken(self, reason: str | None) -> None:
        """Refuses to generate, because the weights are not whole, until called with None."""

    def revive(self) -> None:
        """Ends the engine and starts another, with the weights of its checkpoint; `on_restart` is not called.

        Raises:
            RolloutError: it does not start, or is not ours to start.
        """

    def close(self) -> None:
        """Ends the engine's processes."""


def request_seed(sampling: SamplingConfig, round_index: int, prompt_index: int, sample: int) -> int:
    """Seed of one request: depends on these four alone, so neither on the batch nor on what failed before."""
    text = f"{sampling.seed}/{round_index}/{prompt_index}/{sample}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
