"""What every rollout engine does. Token ids in, token ids and log-probs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Protocol

from pmpo_megatron.rollout.config import SamplingConfig
from pmpo_megatron.rollout.vllm_jobs import Job
from pmpo_megatron.types import Prompt, RolloutGroup

HERE = ""  # in `RolloutEngine.hosts`: the host of the process that has the engine


class RolloutEngine(Protocol):
    """Makes rollouts with the newest weights that were pushed to it.

    ``version`` counts weight updates. ``hosts`` are those of its workers as this process reaches them, `HERE` for its own;
    none where there are no weights to update. ``on_restart`` is called, with the engine, after a crashed part was started
    again, and has to bring its weights up to date before any token is sampled there.
    """

    version: int
    hosts: tuple[str, ...]
    on_restart: Callable[[Any], None] | None

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, round_index: int) -> list[RolloutGroup]:
        """``samples_per_prompt`` responses to each prompt, in the order of ``prompts``.

        Raises:
            RolloutError: the engine failed beyond repair, or does not hold whole weights.
        """

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, round_index: int) -> list[Future[RolloutGroup]]:
        """As `generate`, without waiting; what is submitted later joins what is under way. A future may be cancelled."""

    def ask(self, jobs: Sequence[Job], *, divided: bool) -> list[Future[RolloutGroup]]:
        """What `generate` and `submit` are made of, for prompts that each have sampling and seeds of their own.

        Args:
            divided: a job's ``home`` answers it, and each engine gets all of its jobs in one message; else ``home`` is
                preferred to other engines that have room.
        """

    def update(self, version: int) -> AbstractContextManager[None]:
        """Whatever is called inside brings all workers to whole weights, which are then called ``version``.

        An engine that sleeps is woken: room for weights, weights, room for the KV cache.

        No token is sampled meanwhile; responses under way go on afterwards. If it raises, nothing is sampled until another
        update succeeds.
        """

    def collective_rpc(self, method: str, *arguments: Any) -> list[Any]:
        """Calls ``method`` of every vLLM worker's extension class; what each returned.

        Raises:
            RolloutError: an engine died, or its worker raised.
        """

    def sleep(self) -> None:
        """Frees memory on the GPUs (`RolloutConfig.sleep`); the next `update` takes it again.

        What is still asked for is cancelled; nothing may be asked meanwhile.

        Raises:
            RolloutError: vLLM could not.
        """

    def revive(self) -> None:
        """Starts what has ended again, with the weights of its checkpoint; `on_restart` is not called.

        Raises:
            RolloutError: it does not start.
        """

    def close(self) -> None:
        """Ends the engine's processes."""


class EngineAround:
    """Another engine, of which a subclass does something differently. Everything else goes to that engine."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._engine, name, value)
