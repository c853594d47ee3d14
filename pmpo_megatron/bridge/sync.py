"""Pushing a policy's weights into the rollout engine: streamed, atomic to the engine, verified; again if it was restarted."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pmpo_megatron.bridge.buckets import bucket_bytes
from pmpo_megatron.bridge.channel import GIVEN_UP, Sender, end_early
from pmpo_megatron.bridge.config import BESIDE, ON_GPU, BridgeConfig, choose_transport
from pmpo_megatron.bridge.lanes import LanePlan, Shards, fill, nodes_of_ranks
from pmpo_megatron.bridge.media import FILES, SHARED_MEMORY
from pmpo_megatron.bridge.source import WeightSource, give_back_cache
from pmpo_megatron.errors import RolloutError, WeightSyncError
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.parallel.collectives import broadcast_object, gather_objects
from pmpo_megatron.parallel.processes import address_toward, sweep
from pmpo_megatron.parallel.stand_by import StandBy
from pmpo_megatron.rollout.engine import HERE, RolloutEngine

logger = logging.getLogger(__name__)
ATTEMPTS = 2  # an engine that dies while it takes weights is started again, once
Descriptions = list[dict[str, Any] | None]  # of each rank's lane, where it has one


@dataclass(frozen=True)
class PushReport:
    """What an update moved, and whether every tensor's fingerprint was compared.

    ``waited_s`` of ``seconds`` is what the slowest of the engine's workers waited for weights; the rest of the time it loaded
    them, which no transport makes shorter. Each rank ``handed`` its share of ``bytes`` to workers and ``received``
    some of that from other ranks before.
    """

    version: int
    seconds: float
    waited_s: float
    bytes: int
    tensors: int
    verify: str
    received: tuple[int, ...] = ()
    handed: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Failure:
    """What went wrong in an attempt, and whether another one may go right."""

    error: str
    again: bool


@dataclass(frozen=True)
class _Told:
    """What a rank says when it has handed over its share, or could not."""

    problem: str | None
    fingerprints: dict[str, int]
    received: int
    handed: int


class WeightBridge:
    """Keeps an engine's weights those of a policy. Every rank has one; the engine exists on rank 0, None elsewhere.

    Weights come from all ranks, so an engine that was started again in the middle of a batch needs all ranks to get them:
    whatever generates runs in ``stand_by``, where they wait for it.
    """

    def __init__(self, policy: Policy, engine: RolloutEngine | None, config: BridgeConfig, stand_by: StandBy) -> None:
        self.policy, self.engine, self.config, self.state = policy, engine, config, policy.state
        self._hosts = broadcast_object(engine.hosts if engine is not None else None, self.state)
        self.active = bool(self._hosts)  # recorded rollouts hold no weights
        self.version: int | None = None  # nothing was pushed yet
        self._push_again = stand_by.offer(lambda: self.push(self.version or 0))
        self._sender: Sender | None = None
        self._channel: str | None = None  # what the workers know the present lanes, and their plan, by
        self._plan: LanePlan | None = None  # of the present workers; a large mixture has 25,000 pieces, which take a second
        if self.active:
            device = self.state.device
            self.transport = choose_transport(config.transport, device=device.type, hosts=self._hosts)
            self.source = WeightSource(policy, device if self.transport in ON_GPU else torch.device("cpu"))
            held, nodes = gather_objects(Shards.of(self.state), self.state), nodes_of_ranks(self.state)
            limit, beside = int(config.bucket_mib * 2**20), self.transport in BESIDE
            self._make_plan = partial(
                LanePlan, self.source.entries.values(), held, nodes, beside=beside, dtype=self.source.dtype, limit=limit
            )
            sweep(FILES, config.directory or SHARED_MEMORY)
        if engine is not None:
            engine.on_restart = self._ask_for_weights

    def push(self, version: int) -> PushReport:
        """Brings the engine to this policy's weights and calls them ``version``. Collective.

        Raises:
            WeightSyncError: on every rank: what arrived is not what was sent, or the engine failed; names tensor and
                the engine's rank. The engine refuses to generate until a later push succeeds.
        """
        self.version = version
        give_back_cache(self.state.device)
        if not self.active:
            if self.engine is not None:
                with self.engine.update(version):
                    pass
            return PushReport(version, 0.0, 0.0, 0, 0, "off")
        for attempt in range(1, ATTEMPTS + 1):
            outcome = self._push_once(version, last=attempt == ATTEMPTS)
            if isinstance(outcome, PushReport):
                return outcome
            failure = outcome.error
            if not outcome.again or not self._revive(failure):
                break
        raise WeightSyncError(failure)

    def close(self) -> None:
        """Gives the lane's memory back."""
        if self._sender is not None:
            self._sender.close()
        self._sender = self._channel = self._plan = None

    def _ask_for_weights(self, engine: RolloutEngine) -> None:
        """Called by the thread that generates, after the engine was started again: waits until it has the newest weights."""
        if not self.active or self.version is None:
            return
        if not self._push_again():
            raise RolloutError("the run ended before the engine, which was started again, got its weights")

    def _push_once(self, version: int, *, last: bool) -> PushReport | _Failure:
        """The same outcome on all ranks."""
        outcome: PushReport | _Failure | None
        try:
            with self.engine.update(version) if self.engine is not None else nullcontext():
                outcome = self._deliver(version)
        except (WeightSyncError, RolloutError) as failure:
            outcome = _Failure(str(failure), again=isinstance(failure, RolloutError) and not last)
        outcome = broadcast_object(outcome, self.state)
        if isinstance(outcome, _Failure):
            self.close()
        elif self._sender is not None:
            self._sender.finish()
        return outcome

    def _revive(self, error: str) -> bool:
        """Whether the engine, which failed, runs again."""
        revived = False
        if self.engine is not None:
            logger.warning("the engine failed while it took weights: %s; starting it again", error)
            try:
                self.engine.revive()
                revived = True
            except RolloutError as failure:
                logger.error("%s", failure)
        return broadcast_object(revived, self.state)

    def _deliver(self, version: int) -> PushReport | None:
        """One attempt. Collective; what it did, on rank 0, where alone it is known whether the workers succeeded.

        Raises:
            WeightSyncError: what arrived is not what was sent, or there is no room for what is sent.
            RolloutError: the engine died or does not answer.
        """
        started = time.monotonic()
        workers, channel = self._describe_workers()
        plan, known = self._plan, {worker["channel"] for worker in workers} == {self._channel}
        if plan is None or not known:
            self.close()
            known, plan = False, self._make_plan([worker["node"] for worker in workers])
            self._channel, self._plan = channel, plan
        with self._taking(version, plan, self._open_lanes(plan), known=known) as call:
            told = gather_objects(self._hand_over(plan), self.state)
        if call is None:
            return None
        waited_s = self._check(call.result(), told)
        shapes = self.policy.mapping.hf_shapes.values()
        size = sum(torch.Size(shape).numel() for shape in shapes) * self.source.dtype.itemsize
        moved = tuple(each.received for each in told), tuple(each.handed for each in told)
        return PushReport(version, time.monotonic() - started, waited_s, size, len(shapes), self.config.verify, *moved)

    def _describe_workers(self) -> tuple[list[dict[str, Any]], str]:
        """(what every worker says of itself, a name for lanes that they do not know yet)."""
        described, failure = None, RolloutError("the engine does not answer")
        if self.engine is not None:
            try:
                described = self.engine.collective_rpc("pmpo_describe"), uuid.uuid4().hex
            except RolloutError as error:
                failure = error
        if (described := broadcast_object(described, self.state)) is None:
            raise failure
        return described

    def _open_lanes(self, plan: LanePlan) -> Descriptions:
        """Begins an update on every lane; those that are not there are made."""
        description, problem = None, None
        if share := plan.share(self.state.rank):
            try:
                self._sender = self._sender or Sender(
                    self.transport,
                    slot_bytes=max(map(bucket_bytes, share)),
                    workers=plan.workers_of(self.state.rank),
                    device=self.state.device,
                    timeout_s=self.config.timeout_s,
                    address=self._address(),
                    directory=self.config.directory,
                )
                description = self._sender.begin()
            except OSError as error:
                problem = f"rank {self.state.rank}: no room for the weights on their way to the engine: {error}"
        opened = gather_objects((description, problem), self.state)
        if problem := next((problem for _, problem in opened if problem is not None), None):
            raise WeightSyncError(problem)
        return [description for description, _ in opened]

    def _address(self) -> str | None:
        """Where workers on other nodes reach this rank; None if none has to."""
        others = [host for host in self._hosts if host != HERE]
        if self.transport in BESIDE or not others:
            return None
        return self.config.address or address_toward(others[0])

    @contextmanager
    def _taking(self, version: int, plan: LanePlan, lanes: Descriptions, *, known: bool) -> Iterator[Future | None]:
        """On rank 0 the call, in a thread, that has workers take the buckets (``known``: as in the last update); if it ends
        early, so do all lanes."""
        if self.engine is None:
            yield None
            return
        channel = {
            "name": self._channel,
            "lanes": {place: [lanes[rank] for rank in each] for place, each in plan.ranks.items()},
        }
        manifest: dict[str, Any] = {"version": version, "turns": None if known else plan.turns, "channel": channel}
        manifest |= {"verify": self.config.verify, "rounding": self.config.rounding}
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights") as thread:
            call = thread.submit(self.engine.collective_rpc, "pmpo_receive_weights", manifest)
            call.add_done_callback(lambda call: _end_lanes(lanes, _why_ended(call)))
            try:
                yield call
            except BaseException as error:  # a rank failed: the workers wait for nothing more
                _end_lanes(lanes, f"{type(error).__name__}: {error}")
                raise

    def _hand_over(self, plan: LanePlan) -> _Told:
        """This rank's share into its lane; it takes part in what the other ranks need, to the end, also if that fails."""
        before, problem, fingerprints = self.source.received_bytes, None, {}
        stream = self.source.stream(plan.pieces)
        if self._sender is not None:
            try:
                fingerprints = fill(self._sender, plan.share(self.state.rank), stream, self.config.verify)
            except WeightSyncError as error:
                problem = str(error)
                self._sender.fail(f"rank {self.state.rank}: {problem}")
        for _ in stream:
            assert problem is not None, "more comes than was planned"
        handed = self._sender.sent_bytes if self._sender is not None else 0
        return _Told(problem, fingerprints, self.source.received_bytes - before, handed)

    @staticmethod
    def _check(answers: list[dict[str, Any]], told: list[_Told]) -> float:
        """Seconds that the slowest worker waited for tensors; raises WeightSyncError unless all of them are right."""
        problems = [f"rank {rank}: {each.problem}" for rank, each in enumerate(told) if each.problem]
        problems += [f"rollout worker {n}: {answer['problem']}" for n, answer in enumerate(answers) if answer["problem"]]
        if problems:
            raise WeightSyncError(min(problems, key=lambda text: GIVEN_UP in text))  # who failed by itself comes first
        sent: dict[str, int] = {}
        for rank, each in enumerate(told):
            for name, value in each.fingerprints.items():
                if sent.setdefault(name, value) != value:
                    raise WeightSyncError(f"rank {rank}: {name} is not what other nodes hold: the replicas have come apart")
        for worker, answer in enumerate(answers):
            for name, value in sent.items():
                if answer["fingerprints"].get(name) != value:
                    raise WeightSyncError(f"rollout worker {worker}: {name} is not what was sent (its fingerprint differs)")
        return max(answer["waited_s"] for answer in answers)


def _why_ended(call: Future) -> str | None:
    """Why the call that has the workers take buckets ended before they had all of them."""
    if (error := call.exception()) is not None:
        return str(error).partition("\n")[0]
    problems = (f"rollout worker {n}: {answer['problem']}" for n, answer in enumerate(call.result()) if answer["problem"])
    return next(problems, None)


def _end_lanes(lanes: Descriptions, reason: str | None) -> None:
    descriptions = [description for description in lanes if description is not None]
    if reason is not None and descriptions:
        with ThreadPoolExecutor(max_workers=len(descriptions)) as threads:  # who is gone keeps its caller waiting
            list(threads.map(lambda description: end_early(description, reason), descriptions))
