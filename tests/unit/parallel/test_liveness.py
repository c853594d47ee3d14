"""A wait for another rank whose key-value store dies ends with one line; tests/distributed/test_liveness.py plays the rest."""

import subprocess
import sys
import threading

import pytest

from pmpo_megatron.errors import RankFailure
from pmpo_megatron.parallel import liveness

HOLDS_A_STORE = """
import torch.distributed as dist, time
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("mine", [False, True])
def test_the_store_of_a_run_that_dies_is_named(mine, monkeypatch):
    holder = subprocess.Popen([sys.executable, "-c", HOLDS_A_STORE], stdout=subprocess.PIPE, text=True)
    try:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", holder.stdout.readline().strip())
        liveness.start_watch(rank=0, world_size=2, heartbeat_s=0.5, stall_s=300.0)
        if mine:
            holder.kill()
            holder.wait()
        else:
            threading.Timer(1.0, holder.kill).start()
        with pytest.raises(RankFailure, match="waited for rank 1: the run's key-value store is gone"):
            for _ in range(2):  # the first write to a dead peer may still succeed
                liveness.wait_for_key("weights", mine=mine, source=1, timeout_s=None)
    finally:
        liveness.stop_watch()
        holder.kill()
        holder.wait()
