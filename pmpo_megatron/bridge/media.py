"""What carries a bucket's bytes from a rank to rollout workers: memory that both see, or a broadcast.

Each medium has two slots, so that one bucket is filled while the one before it is read. `channel` decides who may touch
which slot when; here bytes only move. The sender's half is made by `open_medium`, a worker's by `join_medium`.
"""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pmpo_megatron.errors import WeightSyncError
from pmpo_megatron.parallel.processes import owned_prefix

SLOTS = 2
FILES = "pmpo-weights-"  # how the names of files and directories of weights begin
SHARED_MEMORY = "/dev/shm"
LOOPBACK = "127.0.0.1"


class Medium:
    """One end: memory of two slots in one piece. ``slot`` n is that of bucket n, uint8, and ``move`` takes its bytes across."""

    memory: torch.Tensor
    slot_bytes: int

    def connect(self) -> None:
        """Called by every end before the first bucket of every update, when all are there."""

    def slot(self, number: int) -> torch.Tensor:
        start = number % SLOTS * self.slot_bytes
        return self.memory[start : start + self.slot_bytes]

    def move(self, number: int, size: int) -> None:
        """The first ``size`` bytes of bucket ``number``; where both ends see the same there is nothing to do."""

    def description(self) -> dict[str, Any]:
        """What a worker needs to join; JSON."""
        raise NotImplementedError

    def abort(self) -> None:
        """Ends what `move` waits for in another thread, because other ends will not take part; only `close` may follow."""

    def close(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)


def open_medium(
    kind: str,
    *,
    slot_bytes: int,
    workers: int,
    store: dist.Store,
    device: torch.device,
    timeout_s: float,
    directory: str | None,
    loopback: bool,
) -> Medium:
    """A rank's end.

    Raises:
        OSError: there is no room for the slots.
    """
    if kind == "shared_memory":
        return SharedFile.create(slot_bytes, directory)
    if kind == "cuda_ipc":
        return SharedGpuMemory.create(slot_bytes, device)
    settings: dict[str, Any] = dict(slot_bytes=slot_bytes, size=workers + 1, timeout_s=timeout_s, loopback=loopback)
    return Broadcast(kind, rank=0, store=store, device=device, **settings)


def join_medium(description: dict[str, Any], *, store: dist.Store, device: torch.device) -> Medium:
    """A worker's end."""
    kind, values = description["kind"], {key: value for key, value in description.items() if key != "kind"}
    if kind == "shared_memory":
        return SharedFile(**values)
    if kind == "cuda_ipc":
        return SharedGpuMemory.join(device=device, **values)
    return Broadcast(kind, rank=store.add("ranks", 1), store=store, device=device, **values)  # counted from 1


class SharedFile(Medium):
    """A file in the host's memory that both ends map, once: mapping costs a page fault for every 4 KiB, more than copying."""

    def __init__(self, path: str, slot_bytes: int, *, owner: bool = False) -> None:
        self.path, self.slot_bytes, self._owner = Path(path), slot_bytes, owner
        self.memory = torch.from_file(path, shared=True, size=SLOTS * slot_bytes, dtype=torch.uint8)

    @staticmethod
    def create(slot_bytes: int, directory: str | None) -> SharedFile:
        descriptor, path = tempfile.mkstemp(prefix=owned_prefix(FILES), dir=directory or SHARED_MEMORY)
        try:
            os.posix_fallocate(descriptor, 0, SLOTS * slot_bytes)  # a full /dev/shm says so here, not by SIGBUS later
        except OSError:
            os.unlink(path)
            raise
        finally:
            os.close(descriptor)
        return SharedFile(path, slot_bytes, owner=True)

    def connect(self) -> None:
        """Every worker has mapped the file: without its name the memory goes with the processes, however they end."""
        if self._owner:
            self.path.unlink(missing_ok=True)

    def description(self) -> dict[str, Any]:
        return {"kind": "shared_memory", "path": str(self.path), "slot_bytes": self.slot_bytes}

    def close(self) -> None:
        self.path.unlink(missing_ok=True)


class SharedGpuMemory(Medium):
    """Memory of a rank's GPU, opened by the workers through CUDA IPC; over NVLink where their GPU is another one."""

    def __init__(self, memory: torch.Tensor, slot_bytes: int) -> None:
        self.memory, self.slot_bytes = memory, slot_bytes

    @staticmethod
    def create(slot_bytes: int, device: torch.device) -> SharedGpuMemory:
        return SharedGpuMemory(torch.empty(SLOTS * slot_bytes, dtype=torch.uint8, device=device), slot_bytes)

    def description(self) -> dict[str, Any]:
        from torch.multiprocessing.reductions import reduce_tensor

        handle = base64.b64encode(pickle.dumps(reduce_tensor(self.memory)[1])).decode()
        return {"kind": "cuda_ipc", "handle": handle, "slot_bytes": self.slot_bytes}

    @staticmethod
    def join(*, handle: str, slot_bytes: int, device: torch.device) -> SharedGpuMemory:
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        arguments = list(pickle.loads(base64.b64decode(handle)))
        arguments[6] = device.index  # the memory is opened from this worker's GPU (vLLM 0.32, ipc_engine.py, does the same)
        return SharedGpuMemory(rebuild_cuda_tensor(*arguments), slot_bytes)

    def move(self, number: int, size: int) -> None:
        torch.cuda.synchronize()  # the copies into the slot are done before anybody hears of it


class Broadcast(Medium):
    """A process group of a rank, its rank 0, and all workers, apart from the trainer's and the engine's own. NCCL or gloo."""

    def __init__(
        self,
        kind: str,
        *,
        slot_bytes: int,
        rank: int,
        size: int,
        store: dist.Store,
        device: torch.device,
        timeout_s: float,
        loopback: bool,
    ) -> None:
        self.kind, self.slot_bytes, self.rank = kind, slot_bytes, rank
        self.settings: dict[str, Any] = {"slot_bytes": slot_bytes, "size": size, "timeout_s": timeout_s, "loopback": loopback}
        where = device if kind == "nccl" else torch.device("cpu")
        self.memory = torch.empty(SLOTS * slot_bytes, dtype=torch.uint8, device=where)
        self._store = dist.PrefixStore("broadcast", store)
        self._group: Any = None
        self._works: dict[int, Any] = {}

    def description(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.settings}

    def connect(self) -> None:
        if self._group is None:
            self._group = self._make_group()
            with _as_sync_error():
                self._broadcast(1).wait()  # NCCL connects in its first collective, which all ends enter here

    def slot(self, number: int) -> torch.Tensor:
        if (work := self._works.pop(number % SLOTS, None)) is not None:
            with _as_sync_error():
                work.wait()  # the bucket before in this slot has left
        return super().slot(number)

    def move(self, number: int, size: int) -> None:
        with _as_sync_error():
            work = self._broadcast(size, number)
            if self.rank == 0:
                self._works[number % SLOTS] = work
            else:
                work.wait()

    def abort(self) -> None:
        """NCCL's kernels wait on the GPU for a worker that died, and every synchronisation with them, until the watchdog ends
        this process. gloo needs no such thing: its connections break with the worker."""
        if self._group is not None:
            self._group.abort()

    def close(self) -> None:
        self._group, self._works = None, {}

    def _broadcast(self, size: int, number: int = 0) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self._group.broadcast([super().slot(number)[:size]], options)

    def _make_group(self) -> Any:
        rank, size, timeout = self.rank, self.settings["size"], timedelta(seconds=self.settings["timeout_s"])
        if self.kind == "nccl":
            from torch.distributed.distributed_c10d import ProcessGroupNCCL

            options = ProcessGroupNCCL.Options()
            options._timeout = timeout
            return ProcessGroupNCCL(self._store, rank, size, options)
        from torch.distributed.distributed_c10d import ProcessGroupGloo

        if not self.settings["loopback"]:
            return ProcessGroupGloo(self._store, rank, size, timeout=timeout)  # GLOO_SOCKET_IFNAME, or the host's name
        gloo: Any = ProcessGroupGloo  # its type stub has no _Options
        options = gloo._Options()
        options._timeout, options._devices = timeout, [gloo.create_device(hostname=LOOPBACK)]
        return gloo(self._store, rank, size, options)


@contextlib.contextmanager
def _as_sync_error() -> Iterator[None]:
    """A transfer that failed, or was aborted, is the update's failure and not a defect of this program."""
    try:
        yield
    except RuntimeError as error:
        raise WeightSyncError(f"a broadcast of weights ended early: {error}") from None
