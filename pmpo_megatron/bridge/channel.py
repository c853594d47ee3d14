"""One lane: buckets from a rank to rollout workers, in order, two at a time. Who may touch which slot when, and if one fails.

The two ends meet at a key-value store that the rank serves. It fills a slot when every worker has taken the bucket before in
it, moves it, and says ``sent``; a worker waits for that, uses the tensors, and says ``taken``. Whoever cannot go on says why;
each waits in steps, and looks between them whether somebody did.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pmpo_megatron.bridge.media import LOOPBACK, SLOTS, Broadcast, join_medium, open_medium
from pmpo_megatron.errors import WeightSyncError

STEP = timedelta(seconds=1)
LAST_WORD_S = 10.0  # how long one that may be gone is waited for
GO = "go"
GIVEN_UP = "the update was given up"  # in what everybody says but the one who gave it up


class Sender:
    """A rank's end, for any number of updates of the same workers.

    Args:
        kind: transport, of `bridge.config`.
        slot_bytes: of the largest bucket.
        workers: that will join, of all engines.
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
        address: str | None = None,
        directory: str | None = None,
    ) -> None:
        self.workers, self.timeout_s = workers, timeout_s
        self._store, port = _serve(LOOPBACK if address is None else "", timeout_s)
        self._where = {"host": address or LOOPBACK, "port": port, "timeout_s": timeout_s}
        self.medium = open_medium(
            kind,
            slot_bytes=slot_bytes,
            workers=workers,
            store=self._store,
            device=device,
            timeout_s=timeout_s,
            directory=directory,
            loopback=address is None,
        )
        self._medium_description = self.medium.description()
        self._update = self._next = self.sent_bytes = 0
        self._ended = threading.Event()

    def begin(self) -> dict[str, Any]:
        """Begins an update; what the workers, and `end_early`, need to know of it."""
        self._ended.set()
        self._update, self._next, self.sent_bytes = self._update + 1, 0, 0
        description = self._where | {"update": self._update, "workers": self.workers, "medium": self._medium_description}
        if isinstance(self.medium, Broadcast):
            self._ended = threading.Event()
            watched = _key(self._update, "failed"), self._ended
            threading.Thread(target=self._abort_if_given_up, args=watched, daemon=True, name="lane").start()
        return description

    def slot(self) -> torch.Tensor:
        """The memory of the next bucket, once every worker has taken the one before in it.

        Raises:
            WeightSyncError: the workers did not come within ``timeout_s``, or the update was given up.
        """
        number = self._next
        key = _key(self._update, "taken", number - SLOTS) if number >= SLOTS else _key(self._update, "joined")
        began = time.monotonic()
        while not _came(self._store, f"{key}/all"):
            _check_goes_on(self._store, self._update)
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
        self._store.set(_key(self._update, "sent", self._next), GO)
        self._next += 1
        self.sent_bytes += size

    def fail(self, reason: str) -> None:
        """Lets the workers fail that wait for a bucket."""
        _give_up(self._store, self._update, reason)

    def finish(self) -> None:
        """Forgets the keys of an update that every worker has ended."""
        self._ended.set()
        counts = [_key(self._update, "joined"), *(_key(self._update, "taken", number) for number in range(self._next))]
        sent = (_key(self._update, "sent", number) for number in range(self._next))
        for key in (*counts, *(f"{key}/all" for key in counts), *sent):
            self._store.delete_key(key)

    def close(self) -> None:
        self._ended.set()
        self.medium.close()

    def _abort_if_given_up(self, failed: str, ended: threading.Event) -> None:
        """In a thread of its own: the other one may wait inside a broadcast for a worker that died."""
        while not ended.wait(STEP.total_seconds()):
            if self._store.check([failed]):
                self.medium.abort()
                return


class Receiver:
    """A worker's end of the lane that ``description`` tells of."""

    def __init__(self, description: dict[str, Any], device: torch.device) -> None:
        self.timeout_s, self.device, self.workers = description["timeout_s"], device, description["workers"]
        self._store = _join(description)
        self.medium = join_medium(description["medium"], store=self._store, device=device)
        self._update = self._next = 0

    def begin(self, update: int) -> int:
        """Joins an update; the number of workers that have. 0 where all must take several lanes' buckets in the same order."""
        self._update, self._next = update, 0
        number = self._count("joined")
        self.medium.connect()
        return 0 if isinstance(self.medium, Broadcast) else number

    def receive(self, size: int) -> torch.Tensor:
        """The bytes of the next bucket; they stay as they are until `taken`.

        Raises:
            WeightSyncError: the update was given up, or the rank did not send within ``timeout_s``.
        """
        began = time.monotonic()
        while not _came(self._store, _key(self._update, "sent", self._next)):
            _check_goes_on(self._store, self._update)
            if time.monotonic() - began > self.timeout_s:
                raise WeightSyncError(f"the trainer did not send bucket {self._next} within {self.timeout_s:g} s")
        self.medium.move(self._next, size)
        return self.medium.slot(self._next)[:size]

    def taken(self) -> None:
        """Nothing refers to the memory of that bucket any more."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._count("taken", self._next)
        self._next += 1

    def fail(self, reason: str) -> None:
        """Tells the rank that this worker takes no more buckets of this update."""
        _give_up(self._store, self._update, reason)

    def close(self) -> None:
        """Lets go of the memory, which is the rank's."""
        del self.medium, self._store

    def _count(self, kind: str, number: int = 0) -> int:
        key = _key(self._update, kind, number)
        if (came := self._store.add(key, 1)) == self.workers:
            self._store.set(f"{key}/all", GO)
        return came


def end_early(description: dict[str, Any], reason: str) -> None:
    """Gives up the update that ``description`` began, from anywhere. A rank that is gone is told nothing."""
    with suppress(dist.DistError):
        _give_up(_join(description, seconds=LAST_WORD_S), description["update"], reason)


def _give_up(store: dist.Store, update: int, reason: str) -> None:
    store.compare_set(_key(update, "failed"), "", reason)  # the first reason stays


def _check_goes_on(store: dist.Store, update: int) -> None:
    if store.check([key := _key(update, "failed")]):
        raise WeightSyncError(f"{GIVEN_UP}: {store.get(key).decode()}")


def _key(update: int, kind: str, number: int = 0) -> str:
    return f"{update}/{kind}/{number}"


def _join(description: dict[str, Any], seconds: float | None = None) -> dist.Store:
    timeout = timedelta(seconds=seconds or description["timeout_s"])
    return dist.TCPStore(description["host"], description["port"], is_master=False, timeout=timeout)


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
