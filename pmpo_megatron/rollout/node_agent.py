"""On the other nodes: starts vLLMs there for rank 0, which calls them as if they were on its own host.

An agent is a few threads of its node's first rank. Rank 0 connects once for every vLLM that it wants and says how to start
it; from then on the agent passes messages on, between rank 0 and the vLLM's process. If either goes away, so does the other.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge, wait
from pathlib import Path

from pmpo_megatron.errors import RolloutError
from pmpo_megatron.parallel.processes import temporary_directory
from pmpo_megatron.rollout.vllm_child import ELSEWHERE
from pmpo_megatron.rollout.vllm_process import LocalProcess, NodeAddress

logger = logging.getLogger(__name__)


class NodeAgent:
    """Listens until it is closed. ``address`` is for rank 0: its key lets nobody else start processes here.

    What its vLLMs write goes to files in ``logs``, with this host's name; None: to files that end with the agent.
    """

    def __init__(self, logs: Path | None = None) -> None:
        self._listener = Listener((address_here(), 0), backlog=64)
        self.address = NodeAddress(*self._listener.address, secrets.token_bytes(32))
        self._temporary = temporary_directory("pmpo-vllm-") if logs is None else None
        self._logs = logs or Path(self._temporary.name)
        self._logs.mkdir(parents=True, exist_ok=True)
        self._joined: list[_Joined] = []
        threading.Thread(target=self._accept, daemon=True, name="node-agent").start()

    @property
    def process_ids(self) -> list[int]:
        """Of the vLLMs that run here, in the order in which they were started."""
        return [joined.process.process_id for joined in self._joined if joined.process is not None and joined.process.runs]

    def close(self) -> None:
        """Ends what was started here."""
        self._listener.close()
        for joined in self._joined:
            joined.end()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:
                return  # closed
            log_path = self._logs / f"{socket.gethostname()}-engine-{len(self._joined)}.log"
            self._joined.append(_Joined(connection, self.address.key, log_path))


class _Joined:
    """One connection and, if it is rank 0's, the vLLM behind it."""

    def __init__(self, connection: Connection, key: bytes, log_path: Path) -> None:
        self._connection, self._key, self._log_path = connection, key, log_path
        self.process: LocalProcess | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="node-agent-vllm")
        self._thread.start()

    def end(self) -> None:
        if self.process is not None:
            self.process.interrupt()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            deliver_challenge(self._connection, self._key)  # here, not in `_accept`, which a silent caller would block
            answer_challenge(self._connection, self._key)
            launch = self._connection.recv()
            self.process = LocalProcess(launch, self._log_path, {ELSEWHERE: "1"})
            self._pass_on(self.process.open())
        except AuthenticationError as error:
            logger.warning("a caller that is not of this run was refused: %s", error)
        except RolloutError as error:
            self._connection.send(("error", str(error)))
        except (EOFError, OSError):
            pass  # rank 0 is gone, or ends this vLLM
        finally:
            if self.process is not None:
                self.process.kill()
            self._connection.close()

    def _pass_on(self, theirs: Connection) -> None:
        while True:
            for ready in wait([self._connection, theirs]):
                if ready is self._connection:
                    message = self._connection.recv()
                    if message[0] == "interrupt":
                        self.process.interrupt()
                    else:
                        with suppress(BrokenPipeError):  # it has ended, as its end of the pipe will say
                            theirs.send(message)
                    continue
                try:
                    message = theirs.recv_bytes()
                except (EOFError, ConnectionResetError):
                    self._connection.send(("ended", (self.process.why_dead(), self.process.log_tail())))
                    return
                self._connection.send_bytes(message)


def address_here() -> str:
    """This host's address as the run's first node sees it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # sends nothing
        return probe.getsockname()[0]
