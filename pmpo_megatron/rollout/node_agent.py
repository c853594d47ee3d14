"""On other nodes: starts vLLMs there for rank 0, which calls them as if they were on its own host.

An agent is a few threads of its node's first rank, or all that pmpo-rollout-node runs. Rank 0 connects once for every vLLM
that it wants and says how to start it; from then on the agent passes messages on, between rank 0 and the vLLM's process. If
either goes away, so does the other.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path

from pmpo_megatron.errors import RolloutError
from pmpo_megatron.parallel.processes import address_toward, temporary_directory
from pmpo_megatron.rollout.remote_process import NodeAddress
from pmpo_megatron.rollout.vllm_child import NODE, OWN_NODE
from pmpo_megatron.rollout.vllm_process import LocalProcess

logger = logging.getLogger(__name__)
MOST_STRANGERS = 16  # callers that have not proved the key; the next one takes the place of the oldest
PROOF_S = 10.0  # time to prove the key; in it at most 256 bytes are read at once, whatever length a message claims


class NodeAgent:
    """Listens until it is closed. ``address`` is for rank 0: its key lets nobody else start processes here.

    Args:
        host: an address of this host; None: the one by which the run's first node sees it.
        port: 0: any that is free.
        key: None: a new one.
        logs: a directory for what its vLLMs write, with this host's name; None: not kept.
        node: which of the trainer's nodes this is, as its vLLMs say when weights come; `OWN_NODE`: none of them.

    Raises:
        OSError: nothing can listen there.
    """

    def __init__(
        self,
        host: str | None = None,
        port: int = 0,
        key: bytes | None = None,
        *,
        logs: Path | None = None,
        node: str = OWN_NODE,
    ) -> None:
        host = address_toward(os.environ.get("MASTER_ADDR", "127.0.0.1")) if host is None else host
        self._listener = socket.create_server((host, port), backlog=64)
        host, port = self._listener.getsockname()
        self.address = NodeAddress(host, port, secrets.token_bytes(32) if key is None else key)
        self._node, self._parts = node, ExitStack()
        self._logs = logs or Path(self._parts.enter_context(temporary_directory("pmpo-vllm-")))
        self._logs.mkdir(parents=True, exist_ok=True)
        self._joined: list[_Joined] = []
        threading.Thread(target=self._accept, daemon=True, name="node-agent").start()

    @property
    def process_ids(self) -> list[int]:
        """Of the vLLMs that run here, in the order in which they were started."""
        return [joined.process.process_id for joined in self._joined if joined.process is not None and joined.process.runs]

    def close(self) -> None:
        """Ends what was started here."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes `_accept`, which closing alone does not
        self._listener.close()
        for joined in self._joined:
            joined.end()
        self._parts.close()

    def _accept(self) -> None:
        for number, caller in enumerate(self._callers()):
            self._joined = [joined for joined in self._joined if joined.lives]
            strangers = [joined for joined in self._joined if joined.stranger]
            if len(strangers) >= MOST_STRANGERS:
                strangers[0].end()
            log_path = self._logs / f"{socket.gethostname()}-engine-{number}.log"
            self._joined.append(_Joined(caller, self.address.key, log_path, self._node))

    def _callers(self) -> Iterator[socket.socket]:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return  # closed
                time.sleep(0.1)  # the caller is gone again, or this process has no descriptor left
            else:
                yield caller


class _Joined:
    """One connection and, if it is rank 0's, the vLLM behind it."""

    def __init__(self, caller: socket.socket, key: bytes, log_path: Path, node: str) -> None:
        self._caller, self._key, self._log_path, self._node = caller, key, log_path, node
        self.stranger = True
        self.process: LocalProcess | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="node-agent-vllm")
        self._thread.start()

    @property
    def lives(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> None:
        if self.process is not None:
            self.process.interrupt()
        self._cut_off()
        self._thread.join(timeout=10)

    def _cut_off(self) -> None:
        """Ends a stranger's reads; who has proved the key is not cut off."""
        if self.stranger:
            with suppress(OSError):
                self._caller.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        with self._caller, Connection(os.dup(self._caller.fileno())) as connection:
            try:
                self._prove(connection)
                process = self.process = LocalProcess(connection.recv(), self._log_path, {NODE: self._node})
                self._pass_on(process, connection, process.open())
            except AuthenticationError as error:
                logger.warning("a caller that is not of this run was refused: %s", error)
            except RolloutError as error:
                with suppress(OSError):
                    connection.send(("error", (None, str(error))))
            except (EOFError, OSError):
                pass  # rank 0 is gone, or ends this vLLM; or a stranger was cut off
            finally:
                if self.process is not None:
                    self.process.kill()

    def _prove(self, connection: Connection) -> None:
        """Both sides show that they have the key; here, not in `_accept`, which a silent caller would block."""
        limit = threading.Timer(PROOF_S, self._cut_off)
        limit.daemon = True
        limit.start()
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            self.stranger = False
        finally:
            limit.cancel()
            limit.join()  # it may be at work, and the connection is about to be closed

    def _pass_on(self, process: LocalProcess, connection: Connection, theirs: Connection) -> None:
        """What the vLLM says; what it is told goes through a thread of its own, so that neither waits for the other."""
        inward = threading.Thread(target=self._pass_in, args=(process, connection, theirs), daemon=True, name="node-agent-in")
        inward.start()
        try:
            while True:
                connection.send_bytes(theirs.recv_bytes())
        except (EOFError, ConnectionResetError):
            connection.send(("ended", (process.why_dead(), process.log_tail())))
        finally:
            with suppress(OSError):
                self._caller.shutdown(socket.SHUT_RDWR)
            inward.join()

    @staticmethod
    def _pass_in(process: LocalProcess, connection: Connection, theirs: Connection) -> None:
        try:
            while True:
                message = connection.recv()
                if message[0] == "interrupt":
                    process.interrupt()
                else:
                    with suppress(BrokenPipeError):  # it has ended, as its end of the pipe will say
                        theirs.send(message)
        except (EOFError, OSError):
            process.interrupt()  # rank 0 is gone
