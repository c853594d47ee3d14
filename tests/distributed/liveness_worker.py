"""One rank of a scenario: ``python -m tests.distributed.liveness_worker SCENARIO``, with torchrun's variables set."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist

from pmpo_megatron.parallel import liveness
from pmpo_megatron.parallel.collectives import any_rank, broadcast_object
from pmpo_megatron.parallel.liveness import naming_ranks

BAD = 1  # the rank that misbehaves
# On a machine with twenty other busy processes a rank that lives may not run for seconds; these are longer.
HEARTBEAT_S, STALL_S = 1.5, 12.0


def connect(timeout_s: float, heartbeat_s: float):
    """All ranks have come, however late the machine started them; only then collectives time out after ``timeout_s``."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=200))
    group = dist.new_group(timeout=timedelta(seconds=timeout_s))
    liveness.start_watch(rank=rank, world_size=world_size, heartbeat_s=heartbeat_s, stall_s=STALL_S)
    dist.barrier()
    state = SimpleNamespace(rank=rank, world_size=world_size, control_group=group)
    assert not any_rank(False, state) and any_rank(rank == BAD, state)
    return state


def killed(state):
    if state.rank == BAD:
        os.kill(os.getpid(), signal.SIGKILL)
    with naming_ranks("the first sum"):
        dist.all_reduce(torch.zeros(1))


def stopped(state):
    if state.rank == BAD:
        os.kill(os.getpid(), signal.SIGSTOP)
    with naming_ranks("the second sum"):
        dist.all_reduce(torch.zeros(1))


def raises(state):
    if state.rank == BAD:
        error = ValueError("a reward is missing")
        liveness.report_failure(error)
        raise error
    any_rank(False, state)


def elsewhere(state):
    """Lives, but never comes to the collective; the time-out of collectives is 3 s here."""
    if state.rank == BAD:
        liveness.doing("counting sheep")
        time.sleep(200)
    any_rank(False, state)


def slow_source(state):
    """A source that takes longer than ``stall_s`` and the collectives' time-out, but lives: all is well."""
    if state.rank == BAD:
        time.sleep(STALL_S + 2)
    value = broadcast_object({"from": state.rank}, state, source=BAD)
    assert value == {"from": BAD}, value
    print("RECEIVED", flush=True)


def source_dies(state):
    if state.rank == BAD:
        os.kill(os.getpid(), signal.SIGKILL)
    broadcast_object(None, state, source=BAD)


def source_late(state):
    if state.rank == BAD:
        time.sleep(200)
    broadcast_object(None, state, source=BAD, timeout_s=1.5)


def ordinary_error(state):
    with naming_ranks("a computation"):
        torch.zeros(2) @ torch.zeros(3)


if __name__ == "__main__":
    name = sys.argv[1]
    joined = connect(
        timeout_s=3.0 if name in ("elsewhere", "slow_source") else 60.0,
        # So quick that an interpreter that ends would nearly always find the watching thread inside the store's C++ code.
        heartbeat_s=1e-4 if name == "ordinary_error" else HEARTBEAT_S,
    )
    globals()[name](joined)
    liveness.stop_watch()
    dist.destroy_process_group()
