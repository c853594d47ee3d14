"""Work of rank 0 alone, for which the other ranks stand by: when it needs something of all ranks meanwhile, all do it."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

from pmpo_megatron.parallel.collectives import broadcast_object
from pmpo_megatron.parallel.state import ParallelState

T = TypeVar("T")
POLL_S = 0.05


class StandBy:
    """Every rank has one, and the same services were offered to each in the same order."""

    def __init__(self, state: ParallelState) -> None:
        self._state = state
        self._services: list[Callable[[], object]] = []
        self._requests: queue.SimpleQueue[tuple[int, Future[None]]] = queue.SimpleQueue()
        self._waiting: set[Future[None]] = set()
        self._closed = False

    def offer(self, service: Callable[[], object]) -> Callable[[], bool]:
        """Makes ``service``, which is collective, available to rank 0's work.

        Returns:
            what a thread of that work calls to have all ranks call ``service``; it returns when they have, or False if
            the run ended before. Outside `run` it waits for the next `run`.
        """
        self._services.append(service)
        number = len(self._services) - 1

        def request() -> bool:
            done: Future[None] = Future()
            self._waiting.add(done)
            if self._closed:
                done.cancel()
            self._requests.put((number, done))
            try:
                done.result()
            except CancelledError:
                return False
            finally:
                self._waiting.discard(done)
            return True

        return request

    def run(self, work: Callable[[], T]) -> T | None:
        """What ``work`` returned, on rank 0, where alone it is called, in a thread of its own; None elsewhere. Collective."""
        if not self._state.is_main:
            while (number := broadcast_object(None, self._state)) is not None:
                self._services[number]()
            return None
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="attended")
        result = thread.submit(work)
        thread.shutdown(wait=False)
        while not result.done():
            self._serve_one()
        value = result.result()
        broadcast_object(None, self._state)
        return value

    def close(self) -> None:
        """Ends the wait of whoever still asks for a service."""
        self._closed = True
        for done in list(self._waiting):
            done.cancel()

    def _serve_one(self) -> None:
        try:
            number, done = self._requests.get(timeout=POLL_S)
        except queue.Empty:
            return
        broadcast_object(number, self._state)
        self._services[number]()
        done.set_result(None)
