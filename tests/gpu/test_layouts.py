"""Processes on real GPUs: NCCL layouts against one GPU, memory shared through CUDA IPC, a broadcast that is broken off."""

import multiprocessing
import threading
import time

import pytest
import torch
import torch.distributed as dist

from pmpo_megatron.bridge.media import Broadcast, SharedGpuMemory
from tests.distributed.harness import free_port, run_ranks
from tests.gpu.gpu_worker import add_one, connect_and_hang

PAIRS = {
    "tp2-sp": dict(tensor=2, sequence_parallel=True),
    "pp2": dict(pipeline=2),
    "cp2": dict(context=2),
    "dp2": {},
}


def test_nccl_on_the_gpu_and_gloo_for_the_rest(single):
    assert single["float32"]["backends"] == ["nccl", "nccl", "gloo"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", PAIRS)
def test_two_gpus_train_as_one(single, path, name):
    # Transformer Engine has no attention in float32 that divides sequences.
    dtype, tolerance = ("bfloat16", 10) if name == "cp2" else ("float32", 1)
    found = run_ranks(2, "tests.gpu.gpu_worker:train", path, PAIRS[name], dtype, gpu=True)[0]
    assert found["losses"] == pytest.approx(single[dtype]["losses"], rel=5e-3 * tolerance, abs=5e-4 * tolerance)
    assert found["norms"] == pytest.approx(single[dtype]["norms"], rel=2e-2 * tolerance)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_an_aborted_broadcast_lets_go_of_the_gpu():
    """A worker that takes no part: the kernel waits for it, and with it whoever synchronises, until the abort."""
    store = dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    common = dict(slot_bytes=2**20, size=2, timeout_s=100.0, loopback=True)
    worker = multiprocessing.get_context("spawn").Process(target=connect_and_hang, args=(store.port, common), daemon=True)
    worker.start()
    medium = Broadcast("nccl", rank=0, store=store, device=torch.device("cuda", 0), **common)
    medium.connect()
    medium.move(0, 2**20)
    threading.Timer(2.0, medium.abort).start()
    began = time.monotonic()
    torch.cuda.synchronize(0)
    assert time.monotonic() - began < 60, "the broadcast's own time-out"
    medium.close()
    worker.kill()
    worker.join()


def test_another_process_sees_the_memory_through_cuda_ipc():
    """It reads the first slot, and writes the second: what the weights' way to an engine on this host is made of."""
    medium = SharedGpuMemory.create(2**20, torch.device("cuda", 0))
    medium.slot(0).copy_(torch.arange(2**20, device="cuda") % 251)
    medium.slot(1).zero_()
    medium.move(0, 2**20)
    worker = multiprocessing.get_context("spawn").Process(target=add_one, args=(medium.description(),), daemon=True)
    worker.start()
    worker.join(120)
    assert worker.exitcode == 0
    assert torch.equal(medium.slot(1), medium.slot(0) + 1)
    medium.close()
