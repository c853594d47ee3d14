"""Buckets from rank 0 to all rollout workers, in order, two at a time: who may touch which slot when, and what if one fails.

The two ends meet at a key-value store that rank 0 serves. Rank 0 fills a slot when every worker has taken the bucket before
in it, moves it, and says ``sent``; a worker waits for that, uses the tensors, and says ``taken``. Each waits in steps, and
looks between them whether the other gave up.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pmpo_megatron.bridge.media import LOOPBACK, SLOTS, join_medium, open_medium
from pmpo_megatron.errors import WeightSyncError

STEP = timedelta(seconds=1)
GO, GIVEN_UP = "go", "given up"


class Sender:
    """Rank 0's end, for any number of updates of the same workers.

    Args:
        kind: transport, of `bridge.config`, other than disk.
        slot_bytes: of the largest bucket.
        workers: that will join, of all engines; ``elsewhere`` of them on other nodes, where it matters: kind "a+b".
        address: where workers reach this host; None: they are on it.

    Raises:
        OSError: there is no room for the slots, or nothing can listen at ``address``.
    """

    def __init__(
        self,
        kind: str,
        *,
        slot_bytes: int,
        workers: int,
        device: torch.device,
        timeout_s: float,
        elsewhere: int = 0,
        address: str | None = None,
        directory: str | None = None,
    ) -> None:
        self.workers, self.timeout_s, self.identity = workers, timeout_s, uuid.uuid4().hex
        self.host = address or LOOPBACK
        self._store, self.port = _serve(LOOPBACK if address is None else "", timeout_s)
        self.medium = open_medium(
            kind,
            slot_bytes=slot_bytes,
            workers=elsewhere if "+" in kind else workers,
            store=self._store,
            device=device,
            timeout_s=timeout_s,
            directory=directory,
            loopback=address is None,
        )
        self._description = self.medium.description()
        self._update, self._next = 0, 0

    def description(self) -> dict[str, Any]:
        """What the workers need to know, once for each update; begins a new one."""
        self._update, self._next = self._update + 1, 0
        where = {"identity": self.identity, "host": self.host, "port": self.port, "timeout_s": self.timeout_s}
        return where | {"update": self._update, "workers": self.workers, "medium": self._description}

    def slot(self, gone: Callable[[], bool]) -> torch.Tensor:
        """The memory of the next bucket, once every worker has taken the one before in it.

        Raises:
            WeightSyncError: the workers did not come within ``timeout_s``, one failed, or ``gone()``: none will come.
        """
        number = self._next
        key = self._key("taken", number - SLOTS) if number >= SLOTS else self._key("joined", 0)
        began = time.monotonic()
        while not _came(self._store, f"{key}/all"):
            if gone() or self._store.check([self._key("failed", 0)]):
                raise WeightSyncError(f"the rollout engine gave up before bucket {number} of an update")
            if time.monotonic() - began > self.timeout_s:
                came = self._store.add(key, 0)
                missing = f"{came} of {self.workers} rollout workers came"
                raise WeightSyncError(f"{missing} to bucket {number} in {self.timeout_s:g} s")
        if number == 0:
            self.medium.connect()
        return self.medium.slot(number)

    def send(self, size: int) -> None:
        """Moves the first ``size`` bytes of the slot that `slot` gave."""
        self.medium.move(self._next, size)
        self._store.set(self._key("sent", self._next), GO)
        self._next += 1

    def give_up(self) -> None:
        """Lets the workers that wait for the next bucket fail at once."""
        self._store.set(self._key("sent", self._next), GIVEN_UP)

    def abort_if_failed(self, call: Future) -> None:
        """Called in its thread when ``call``, which has all workers take the buckets, is done: if an engine died, or a worker
        ended the update early, the transfers under way would keep rank 0 waiting. Then only `close` may follow."""
        if call.exception() is not None or any(answer["problem"] for answer in call.result()):
            self.medium.abort()

    def finish(self) -> None:
        """Forgets the keys of an update that every worker has ended."""
        counts = [self._key("joined", 0), *(self._key("taken", number) for number in range(self._next))]
        for key in (*counts, *(f"{key}/all" for key in counts), *(self._key("sent", n) for n in range(self._next))):
            self._store.delete_key(key)

    def close(self) -> None:
        self.medium.close()

    def _key(self, kind: str, number: int) -> str:
        return f"{self._update}/{kind}/{number}"


class Receiver:
    """A worker's end of the channel that ``description`` tells of."""

    def __init__(self, description: dict[str, Any], device: torch.device, *, elsewhere: bool = False) -> None:
        self.identity, self.timeout_s = description["identity"], description["timeout_s"]
        timeout = timedelta(seconds=self.timeout_s)
        self._store = dist.TCPStore(description["host"], description["port"], is_master=False, timeout=timeout)
        self.medium = join_medium(description["medium"], store=self._store, device=device, elsewhere=elsewhere)
        self.device, self.workers, self._update = device, description["workers"], 0

    def begin(self, update: int) -> None:
        self._update = update
        self._count("joined")
        self.medium.connect()

    def receive(self, number: int, size: int) -> torch.Tensor:
        """The bytes of bucket ``number``; they stay as they are until `taken`.

        Raises:
            WeightSyncError: rank 0 gave up, or did not send within ``timeout_s``.
        """
        key = self._key("sent", number)
        began = time.monotonic()
        while not _came(self._store, key):
            if time.monotonic() - began > self.timeout_s:
                raise WeightSyncError(f"the trainer did not send bucket {number} within {self.timeout_s:g} s")
        if self._store.get(key).decode() == GIVEN_UP:
            raise WeightSyncError(f"the trainer gave up before bucket {number}")
        self.medium.move(number, size)
        return self.medium.slot(number)[:size]

    def fail(self) -> None:
        """Tells rank 0 that this worker takes no more buckets of this update."""
        self._store.set(self._key("failed", 0), GO)

    def taken(self, number: int) -> None:
        """Nothing refers to the memory of bucket ``number`` any more."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._count("taken", number)

    def close(self) -> None:
        """Lets go of the memory, which is rank 0's."""
        del self.medium, self._store

    def _count(self, kind: str, number: int = 0) -> None:
        key = self._key(kind, number)
        if self._store.add(key, 1) == self.workers:
            self._store.set(f"{key}/all", GO)

    def _key(self, kind: str, number: int) -> str:
        return f"{self._update}/{kind}/{number}"


def _serve(host: str, timeout_s: float) -> tuple[dist.Store, int]:
    """A store that listens at ``host`` ("": everywhere) on a free port."""
    listener = socket.socket()
    try:
        listener.bind((host, 0))
        listener.listen(128)
        port = listener.getsockname()[1]
        descriptor = listener.detach()  # the store closes it
    finally:
        listener.close()
    store = dist.TCPStore(
        host or LOOPBACK,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=descriptor,
        timeout=timedelta(seconds=timeout_s),
    )
    return store, port


def _came(store: dist.Store, key: str) -> bool:
    """Whether ``key`` is there, waiting for it a moment."""
    try:
        store.wait([key], STEP)
    except dist.DistStoreError:
        return False
    return True
