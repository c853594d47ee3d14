"""A vLLM on another node, which the agent there starts, for as long as the connection to it lasts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path

from pmpo_megatron.errors import ConfigError, RolloutError
from pmpo_megatron.rollout.config import RolloutConfig
from pmpo_megatron.rollout.vllm_process import EngineDied, Launch, VLLMProcess

RETRY_S = 0.5


@dataclass(frozen=True)
class NodeAddress:
    """Where a `NodeAgent` listens; whoever knows the key starts processes there."""

    host: str
    port: int
    key: bytes = field(repr=False)


def read_key(path: str) -> bytes:
    """The key that a run and its nodes share: what a file holds, at least 16 bytes, for nobody else to read.

    Raises:
        ConfigError: it cannot be read, is too short, or others can read it.
    """
    try:
        key, others = Path(path).read_bytes().strip(), Path(path).stat().st_mode & 0o077
    except OSError as error:
        raise ConfigError("key_file", f"{path}: {error.strerror}") from None
    if len(key) < 16:
        raise ConfigError("key_file", f"{path}: {len(key)} bytes are no key; try: head -c 32 /dev/urandom | base64 > {path}")
    if others:
        raise ConfigError("key_file", f"{path}: others can read it; chmod 600 {path}")
    return key


def own_nodes(config: RolloutConfig) -> list[NodeAddress]:
    """The addresses of ``config.hosts``; raises ConfigError where there is no key for them."""
    key = read_key(config.key_file) if config.key_file is not None else b""
    return [NodeAddress(host, int(port), key) for host, _, port in (each.rpartition(":") for each in config.hosts)]


class RemoteProcess(VLLMProcess):
    """See `VLLMProcess`. The agent at ``address`` may come later than this process, and come again."""

    def __init__(self, launch: Launch, address: NodeAddress, *, stall_s: float) -> None:
        super().__init__(launch, stall_s=stall_s)
        self._address, self.host = address, address.host
        self._end: tuple[str, str] | None = None  # why it died, and the end of its log

    def open(self, timeout_s: float) -> Connection:
        self._end, deadline = None, time.monotonic() + timeout_s
        while True:
            try:
                connection = Client((self._address.host, self._address.port), authkey=self._address.key)
                connection.send(self.launch)
                return connection
            except (AuthenticationError, EOFError):
                raise RolloutError(f"who answers at {self._where} did not prove to have this run's key") from None
            except OSError as error:
                if time.monotonic() > deadline or self.given_up:
                    raise EngineDied(f"no agent answers at {self._where}: {error.strerror or error}") from None
            time.sleep(RETRY_S)

    @property
    def _where(self) -> str:
        return f"{self._address.host}:{self._address.port}"

    def why_dead(self) -> str:
        how = self._end[0] if self._end is not None else "the connection to the rollout engine broke"
        return f"{how} on {self._address.host}"

    def log_tail(self) -> str:
        return self._end[1] if self._end is not None else f"Its log was on {self._address.host}."

    def interrupt(self) -> None:
        self.send("interrupt", None)

    def _end_process(self) -> None:
        """The agent ends it when the connection does, which `kill` shuts down."""
