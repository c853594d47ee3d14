"""Which process this is, whether another one lives, and what processes that ended left behind."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

logger = logging.getLogger(__name__)
EXIT_LAUNCHER_DIED = 70
POLL_S = 1.0


def host_tag() -> str:
    """The same for processes that can see each other by their numbers: host, its boot, and its container."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if path.startswith("/proc/self") else Path(path).read_text())
        except OSError:
            parts.append("")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def start_time(process_id: int) -> int | None:
    """When a process of this host began, in clock ticks since its boot; None if it does not live. Numbers are used again."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def owned_prefix(prefix: str) -> str:
    """``prefix`` with this process's name in it, for `sweep` of a later one."""
    return f"{prefix}{host_tag()}-{os.getpid()}-{start_time(os.getpid())}-"


def sweep(prefix: str, directory: str | Path) -> list[Path]:
    """Removes what processes of this host and user made with `owned_prefix` in ``directory`` and left when they were killed."""
    pattern, removed = re.compile(re.escape(f"{prefix}{host_tag()}-") + r"(\d+)-(\d+)-\w+"), []
    try:
        entries = [(entry, match) for entry in os.scandir(directory) if (match := pattern.fullmatch(entry.name))]
    except OSError:
        return []
    for entry, match in entries:
        try:
            mine = entry.stat(follow_symlinks=False).st_uid == os.geteuid() and not entry.is_symlink()
            if not mine or start_time(int(match[1])) == int(match[2]):
                continue
            shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
        except OSError:
            continue  # another run sweeps, too
        removed.append(Path(entry.path))
    if removed:
        logger.info("removed what killed runs left in %s: %s", directory, ", ".join(sorted(path.name for path in removed)))
    return removed


def temporary_directory(prefix: str) -> tempfile.TemporaryDirectory[str]:
    """A directory that ends with this process; if it is killed, the next one that asks removes it."""
    sweep(prefix, tempfile.gettempdir())
    return tempfile.TemporaryDirectory(prefix=owned_prefix(prefix))


def end_with_launcher() -> None:
    """Ends this process soon after torchrun, which started it, is gone: nothing would stop or restart it any more."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    threading.Thread(target=_watch_launcher, args=(os.getppid(),), daemon=True, name="launcher").start()


def _watch_launcher(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(POLL_S)
    rank = os.environ.get("RANK", "0")
    print(f"error (rank {rank}): torchrun (process {launcher}) is gone; this process ends", file=sys.stderr, flush=True)
    os._exit(EXIT_LAUNCHER_DIED)


def address_toward(host: str) -> str:
    """This host's address as ``host`` sees it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        address: str = probe.getsockname()[0]
        return address
