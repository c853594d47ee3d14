"""Who is alive, and who did not come: so that a rank that dies or hangs ends the others soon, with its name.

Every rank runs one thread that writes a heartbeat (counter, process id, what the main thread is doing) into the run's
key-value store and watches the next rank's. Nothing here runs inside the micro-batch loop, and no rank reads more than
one other's heartbeat while all is well.

A collective that fails raises RankFailure through `naming_ranks`. One that cannot fail, because PyTorch waits inside it
for a stalled peer, ends the process after ``stall_s`` with the same message: an exception cannot reach it there.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pmpo_megatron.errors import RankFailure

logger = logging.getLogger(__name__)
EXIT_RANK_FAILURE = 70
VICTIM = RankFailure.__name__  # how the report of a rank begins that ended because of another one
GRACE_S = 2.0  # for the main thread's own error to surface first
SIGNS_OF_COMMUNICATION = ("gloo", "nccl", "c10d", "tcpstore", "process group", "processgroup")  # in PyTorch's own messages

Beat = dict[str, Any]  # count, pid, host, doing


@dataclass
class Watch:
    """One rank's heartbeat and its view of the others."""

    store: dist.Store
    rank: int
    world_size: int
    heartbeat_s: float
    stall_s: float
    doing: str = "starting"
    busy_with_others: bool = False  # the main thread is inside a communication
    counters: dict[str, int] = field(default_factory=dict)
    stopping: threading.Event = field(default_factory=threading.Event)

    def start(self) -> Watch:
        self._beat(0)
        self.thread = threading.Thread(target=self._run, name="liveness", daemon=True)
        self.thread.start()
        return self

    def stop(self) -> None:
        """Ends the thread. Left running, an interpreter that ends aborts: it unwinds a thread inside the store's C++ code."""
        self.stopping.set()
        self.thread.join(timeout=self.heartbeat_s + 1)

    def seen(self, rank: int) -> Beat:
        """The last heartbeat of ``rank``; empty if it never gave one."""
        key = f"beat/{rank}"
        beat: Beat = json.loads(self.store.get(key)) if self.store.check([key]) else {}
        return beat

    def post(self, text: str) -> None:
        """Says once why this rank ends, for the others' messages."""
        self.store.set(f"failed/{self.rank}", text[:500])

    def failure_of(self, rank: int) -> str | None:
        key = f"failed/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else None

    def _beat(self, count: int) -> None:
        beat = {"count": count, "pid": os.getpid(), "host": socket.gethostname(), "doing": self.doing}
        self.store.set(f"beat/{self.rank}", json.dumps(beat))

    def _run(self) -> None:
        peer = (self.rank + 1) % self.world_size
        last: Beat = {}
        changed, message, stuck_since, count = time.monotonic(), "", None, 0
        while not self.stopping.wait(self.heartbeat_s):
            count, now = count + 1, time.monotonic()
            try:
                self._beat(count)
                seen, failure = self.seen(peer), self.failure_of(peer)
            except Exception as error:  # the store died: with it the rank or the agent that holds it
                message = message or f"the run's key-value store does not answer ({_first_line(error)})"
                seen, failure = last, None
            if seen != last:
                last, changed = seen, now
            if failure:
                message = message or f"{describe_rank(peer, seen)} ended: {failure}"
            elif now - changed > self.stall_s:
                message = message or f"{describe_rank(peer, seen)} gave no sign of life for {self.stall_s:g} s"
            stuck_since = (stuck_since or now) if message and self.busy_with_others else None
            if stuck_since is not None and now - stuck_since > GRACE_S:
                self._end(message)

    def _end(self, message: str) -> None:
        """Ends the process, whose main thread waits for other ranks where no exception reaches it."""
        print(f"{VICTIM}: rank {self.rank} in {self.doing}: {message}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            self.post(f"{VICTIM}: {message}")
            time.sleep(GRACE_S + 4 * self.heartbeat_s)  # this process may hold the store: let the others read why
        os._exit(EXIT_RANK_FAILURE)


_watch: Watch | None = None


def start_watch(*, rank: int, world_size: int, heartbeat_s: float, stall_s: float) -> None:
    """Begins to watch, until `stop_watch` or the interpreter's end. Does nothing for one process.

    Needs MASTER_ADDR and MASTER_PORT of a running store.
    """
    global _watch
    if world_size == 1 or _watch is not None:
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))  # own connection: own lock
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _watch = Watch(dist.PrefixStore(f"pmpo/{attempt}", store), rank, world_size, heartbeat_s, stall_s).start()
    atexit.register(stop_watch)


def stop_watch() -> None:
    """Ends the heartbeat. Idempotent."""
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


def report_failure(error: BaseException) -> None:
    """Tells the other ranks why this one ends; call it where the program gives up. Never raises."""
    if _watch is not None:
        with contextlib.suppress(Exception):
            _watch.post(f"{type(error).__name__}: {_first_line(error)}")


@contextlib.contextmanager
def naming_ranks(what: str) -> Iterator[None]:
    """Errors of communication inside become RankFailure that names the ranks that are missing; others pass unchanged."""
    if _watch is None:
        yield
        return
    outer, outer_busy = _watch.doing, _watch.busy_with_others
    _watch.doing, _watch.busy_with_others = what, True
    try:
        yield
    except RuntimeError as error:
        if not is_communication_error(error):
            raise
        failure = RankFailure(f"rank {_watch.rank} in {what}: {diagnose(_watch)} (PyTorch: {_first_line(error)})")
        report_failure(failure)
        raise failure from error
    finally:
        _watch.doing, _watch.busy_with_others = outer, outer_busy


def doing(what: str) -> None:
    """Notes what this rank does now, for the others' messages."""
    if _watch is not None:
        _watch.doing = what


def is_communication_error(error: BaseException) -> bool:
    """Whether ``error`` comes from a collective rather than from a computation."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(sign in text for sign in SIGNS_OF_COMMUNICATION)


def diagnose(watch: Watch) -> str:
    """Which ranks failed, are gone, or are elsewhere. Takes about three heartbeats."""
    try:
        before = [watch.seen(rank) for rank in range(watch.world_size)]
        time.sleep(3 * watch.heartbeat_s + 0.5)
        after = [watch.seen(rank) for rank in range(watch.world_size)]
        failures = [watch.failure_of(rank) for rank in range(watch.world_size)]
    except Exception as error:
        return f"the run's key-value store is gone, and with it rank 0 or torchrun's agent ({_first_line(error)})"
    reasons, victims = [], []
    for rank, (old, new, failure) in enumerate(zip(before, after, failures, strict=True)):
        if rank == watch.rank:
            continue
        if failure and failure.startswith(VICTIM):
            victims.append(f"{describe_rank(rank, new)} ended before: {failure}")
        elif failure:
            reasons.append(f"{describe_rank(rank, new)} failed: {failure}")
        elif old == new:
            reasons.append(f"{describe_rank(rank, new)} gives no sign of life")
    if not reasons:
        reasons = victims or [
            f"{describe_rank(rank, beat)} is alive but did not come"
            for rank, beat in enumerate(after)
            if rank != watch.rank and beat.get("doing") != watch.doing
        ]
    return "; ".join(reasons[:8]) or "every rank is alive and in the same place: the network between them failed"


def describe_rank(rank: int, beat: Beat) -> str:
    where = f" (process {beat['pid']} on {beat['host']}, last seen in {beat['doing']})" if beat else " (never seen)"
    return f"rank {rank}{where}"


def wait_for_key(name: str, *, mine: bool, source: int, timeout_s: float | None) -> None:
    """Waits until ``source`` has come to this call; the one that is ``mine`` goes through. Counts calls by ``name``.

    Raises:
        RankFailure: ``source`` failed, gave no sign of life for ``stall_s``, or did not come within ``timeout_s``; or the
            key-value store is gone.
    """
    watch = _watch
    if watch is None:
        return
    number = watch.counters[name] = watch.counters.get(name, 0) + 1
    key = f"{name}/{number}"
    try:
        if mine:
            watch.store.set(key, "1")
        else:
            _wait_for_source(watch, key, source, timeout_s)
    except dist.DistError as error:
        raise RankFailure(f"rank {watch.rank} waited for rank {source}: {diagnose(watch)}") from error


def _wait_for_source(watch: Watch, key: str, source: int, timeout_s: float | None) -> None:
    began = changed = checked = time.monotonic()
    last = watch.seen(source)
    while not watch.store.check([key]):
        time.sleep(0.02 if time.monotonic() - began < 5 else 0.25)
        now = time.monotonic()
        if now - checked < watch.heartbeat_s:
            continue
        checked, beat, failure = now, watch.seen(source), watch.failure_of(source)
        if beat != last:
            last, changed = beat, now
        if failure:
            raise RankFailure(f"rank {watch.rank} waited for {describe_rank(source, beat)}, which failed: {failure}")
        if now - changed > watch.stall_s:
            raise RankFailure(f"rank {watch.rank} waited for {describe_rank(source, beat)}: no sign of life any more")
        if timeout_s is not None and now - began > timeout_s:
            raise RankFailure(f"rank {watch.rank} waited {timeout_s:g} s for {describe_rank(source, beat)}, which did not come")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
