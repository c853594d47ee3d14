"""One run at a time in a directory: a lock of the file system, and a sign of life for file systems that have none.

``run.lock`` names the owner, and its time of change is renewed as long as the owner lives. The owner is taken for dead if
its process is gone, seen from the same host; from another one, if the time is not renewed within `LEASE_S`. The times
compared are all of the directory's file system: clocks of hosts may differ.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pmpo_megatron.errors import ConfigError
from pmpo_megatron.parallel.processes import host_tag, start_time

logger = logging.getLogger(__name__)
NAME = "run.lock"
RENEW_S = 5.0
LEASE_S = 45.0
EXIT_TAKEN_OVER = 70


class RunLock:
    """Held from construction to `close`, or to the end of the process.

    Raises:
        ConfigError: another run lives in ``directory``; names its host and process, and how old its sign of life is.
    """

    def __init__(self, directory: str | Path, *, renew_s: float = RENEW_S, lease_s: float = LEASE_S) -> None:
        self.path, self.renew_s, self.lease_s = Path(directory) / NAME, renew_s, lease_s
        self.path.parent.mkdir(parents=True, exist_ok=True)
        process = os.getpid()
        self._me = {"host": socket.gethostname(), "tag": host_tag(), "process": process, "start": start_time(process)}
        self._closing = threading.Event()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._take()
        except BaseException:
            os.close(self._file)
            raise
        self._thread = threading.Thread(target=self._renew, daemon=True, name="run-lock")
        self._thread.start()

    def close(self) -> None:
        """Lets the next run in. The file stays, empty: to remove it would be a race with whoever opens it."""
        self._closing.set()
        self._thread.join(timeout=self.renew_s)
        with contextlib.suppress(OSError):
            if read_owner(self.path) == self._me:
                os.ftruncate(self._file, 0)
        os.close(self._file)

    def _take(self) -> None:
        locked = self._lock()
        owner = read_owner(self.path)
        if owner is not None and self._lives(owner):
            raise self._in_use(owner)
        if not locked:
            self._replace(owner)
        self._write()
        if owner is not None:
            logger.info("%s: took over from process %s on host %s, which is gone", self.path, owner["process"], owner["host"])

    def _lock(self) -> bool:
        """False: another process holds it. True also where the file system has no locks: the sign of life decides."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        return True

    def _lives(self, owner: dict[str, Any]) -> bool:
        if owner["tag"] == self._me["tag"]:
            return owner["start"] is not None and start_time(owner["process"]) == owner["start"]
        return self._is_renewed(owner)

    def _is_renewed(self, owner: dict[str, Any]) -> bool:
        """Whether an owner on another host gives a sign of life before its lease ends; waits for that, at most the lease."""
        before, age = self._changed(), self._age()
        if age < self.lease_s:
            logger.info(
                "%s is of process %s on host %s: waiting for a sign of life", self.path, owner["process"], owner["host"]
            )
        deadline = time.monotonic() + self.lease_s - age
        while time.monotonic() < deadline:
            time.sleep(min(0.2, self.renew_s))
            if self._changed() != before:
                return True
        return False

    def _replace(self, owner: dict[str, Any] | None) -> None:
        """The lock is held without a living owner: by a run that is just starting, or by a child that outlived its parent."""
        deadline = time.monotonic() + 5
        while not self._lock():
            if time.monotonic() > deadline:
                if owner is None:
                    raise ConfigError("run.directory", f"{self.path.parent}: another run is starting there")
                break
            time.sleep(0.1)
            if (now := read_owner(self.path)) != owner and now is not None and self._lives(now):
                raise self._in_use(now)

    def _in_use(self, owner: dict[str, Any]) -> ConfigError:
        return ConfigError(
            "run.directory",
            f"{self.path.parent} is in use by process {owner['process']} on host {owner['host']} (last sign of life "
            f"{max(self._age(), 0):.0f} s ago); end that run, or choose another directory",
        )

    def _write(self) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(self._me).encode(), 0)
        os.fsync(self._file)

    def _changed(self) -> int:
        return os.stat(self.path).st_mtime_ns

    def _age(self) -> float:
        """Seconds since the owner's last sign of life, by the clock of the file system."""
        probe = self.path.with_name(f"{NAME}.{self._me['tag']}-{self._me['process']}")
        probe.touch()
        try:
            return (probe.stat().st_mtime_ns - self._changed()) / 1e9
        finally:
            probe.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._closing.wait(self.renew_s):
            try:
                owner = read_owner(self.path)
                if owner == self._me:
                    os.utime(self.path)
                elif owner is not None:
                    _end(f"{self.path.parent} was taken over by process {owner['process']} on host {owner['host']}")
                elif not self.path.exists():
                    self._make_again()
                else:
                    self._write()
            except OSError as error:
                logger.warning("%s: no sign of life can be given: %s", self.path, error)

    def _make_again(self) -> None:
        """Somebody removed the file, and perhaps the directory, of a run that goes on."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        os.close(self._file)
        self._file = file
        self._lock()
        self._write()


def read_owner(path: Path) -> dict[str, Any] | None:
    """Who holds the lock; None if nobody does."""
    try:
        owner = json.loads(path.read_text())
        return owner if {"host", "tag", "process", "start"} <= owner.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _end(message: str) -> None:
    print(f"error: {message}: this run gave no sign of life in time; it ends", file=sys.stderr, flush=True)
    os._exit(EXIT_TAKEN_OVER)
