"""What weights travel by: transports, buckets, fingerprints, and a channel whose ends come late, fail or go away."""

import multiprocessing
import os
import threading
import time
from concurrent.futures import Future

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pmpo_megatron.bridge.buckets import ALIGNMENT, bucket_bytes, covered, pieces_in, plan_buckets, whole_tensors
from pmpo_megatron.bridge.channel import Receiver, Sender
from pmpo_megatron.bridge.config import choose_transport
from pmpo_megatron.bridge.fingerprint import FACTOR, fingerprint, weighted_sum
from pmpo_megatron.bridge.source import round_matrix
from pmpo_megatron.errors import ConfigError, RolloutError, WeightSyncError
from pmpo_megatron.rollout.engine import HERE

CPU = torch.device("cpu")


BOTH, OTHERS = (HERE, "node2"), ("node2", "node3")


@pytest.mark.parametrize(
    "device, hosts, expected",
    [
        ("cpu", (HERE,), "shared_memory"),
        ("cuda", (HERE,), "cuda_ipc"),
        ("cpu", OTHERS, "gloo"),
        ("cuda", OTHERS, "nccl"),
        ("cpu", BOTH, "shared_memory+gloo"),
        ("cuda", BOTH, "cuda_ipc+nccl"),
    ],
)
def test_the_transport_that_auto_means(device, hosts, expected):
    assert choose_transport("auto", device=device, hosts=hosts) == expected
    assert choose_transport("disk", device=device, hosts=hosts) == "disk"


@pytest.mark.parametrize(
    "transport, device, hosts, words",
    [
        ("nccl", "cpu", OTHERS, "needs a trainer on GPUs"),
        ("cuda_ipc", "cpu", (HERE,), "needs a trainer on GPUs"),
        ("cuda_ipc", "cuda", OTHERS, "cannot reach other nodes"),
        ("shared_memory", "cpu", BOTH, "cannot reach other nodes"),
        ("nccl", "cuda", (HERE,), "shares its GPU"),
    ],
)
def test_transports_that_cannot_work_are_refused(transport, device, hosts, words):
    with pytest.raises(ConfigError, match=words):
        choose_transport(transport, device=device, hosts=hosts)


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=30), st.integers(1, 5000))
def test_buckets_stay_below_the_limit_and_every_tensor_comes_out_whole_and_in_order(shapes, limit):
    named = {f"t{i}": shape for i, shape in enumerate(shapes)}
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in named.items()}
    buckets = plan_buckets(named, torch.bfloat16, limit)
    sent = []
    for bucket in buckets:
        one_row = len(bucket) == 1 and bucket[0]["rows"][1] - bucket[0]["rows"][0] == 1
        assert 0 < bucket_bytes(bucket) <= limit or one_row
        memory = torch.zeros(bucket_bytes(bucket), dtype=torch.uint8)
        for piece, rows in pieces_in(bucket, memory):
            rows.copy_(tensors[piece["name"]][slice(*piece["rows"])])
            assert rows.data_ptr() % ALIGNMENT == memory.data_ptr() % ALIGNMENT
        sent += pieces_in(bucket, memory)
    received = list(whole_tensors(sent))
    assert [name for name, _ in received] == list(named)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in received)
    assert covered(buckets) == ({name: tuple(shape) for name, shape in named.items()}, [])
    if len(sent) > 1:
        assert covered([bucket for bucket in buckets if bucket is not buckets[0]]) != covered(buckets)
        assert covered([*buckets, buckets[0]])[1], "rows that come twice"


@pytest.mark.parametrize("mode", ["full", "sample"])
def test_a_fingerprint_changes_with_any_bit_it_looks_at(mode):
    tensor = torch.arange(100_000, dtype=torch.float32)
    before = fingerprint(tensor, mode)
    assert before == fingerprint(tensor.clone(), mode) != 0 and fingerprint(tensor, "off") == 0
    for place in (0, 99_999) if mode == "sample" else (0, 17, 54_321, 99_999):
        changed = tensor.clone()
        changed.view(torch.int32)[place] ^= 1
        assert fingerprint(changed, mode) != before
    assert fingerprint(tensor[:-1], mode) != before


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
def test_the_sum_for_gpus_is_its_formula(size, monkeypatch):
    monkeypatch.setattr("pmpo_megatron.bridge.fingerprint.PIECE", 5)
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    raw = bytes(data.tolist()) + b"\0" * (-size % 8)
    words = [int.from_bytes(raw[i : i + 8], "little", signed=True) for i in range(0, len(raw), 8)]
    assert weighted_sum(data, seed=9) == sum((word + 9) * (2 * i + 1) * FACTOR for i, word in enumerate(words)) % 2**64


class Worker(threading.Thread):
    """Takes ``count`` buckets of one byte; ``at`` its number of the bucket it calls ``trouble`` before."""

    def __init__(self, description, count, *, at=None, trouble=None):
        super().__init__(daemon=True)
        self.description, self.count, self.at, self.trouble = description, count, at, trouble
        self.received, self.error = [], None
        self.start()

    def run(self):
        try:
            receiver = Receiver(self.description, CPU)
            receiver.begin(self.description["update"])
            for number in range(self.count):
                if number == self.at:
                    self.trouble(receiver)
                self.received.append(int(receiver.receive(number, 1)[0]))
                receiver.taken(number)
        except Exception as error:
            self.error = error


def send(sender, count, gone=lambda: False):
    for number in range(count):
        sender.slot(gone)[0] = number
        sender.send(1)


def open_sender(kind, *, workers=2, timeout_s=30.0):
    return Sender(kind, slot_bytes=64, workers=workers, device=CPU, timeout_s=timeout_s)


@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
def test_every_worker_gets_every_bucket_also_one_that_is_slow(kind):
    sender = open_sender(kind)
    description = sender.description()
    workers = [Worker(description, 7), Worker(description, 7, at=2, trouble=lambda receiver: time.sleep(0.5))]
    send(sender, 7)
    for worker in workers:
        worker.join(timeout=100)
        assert worker.error is None and worker.received == list(range(7))
    sender.finish()
    sender.close()


def fail(receiver):
    receiver.fail()
    raise RuntimeError("bad tensor")


def test_a_worker_that_fails_ends_the_update_for_all_at_once():
    sender = open_sender("shared_memory")
    description = sender.description()
    bad, good = Worker(description, 9, at=3, trouble=fail), Worker(description, 9)
    with pytest.raises(WeightSyncError, match="gave up before bucket"):
        send(sender, 9)
    sender.give_up()
    good.join(timeout=100)
    assert "the trainer gave up" in str(good.error) and "bad tensor" in str(bad.error)


def test_workers_that_do_not_come_are_counted_and_waits_are_bounded():
    sender = open_sender("shared_memory", timeout_s=4.0)
    alone = Worker(sender.description(), 3)
    with pytest.raises(WeightSyncError, match="1 of 2 rollout workers came to bucket 0 in 4 s"):
        send(sender, 3)
    alone.join(timeout=100)
    assert "did not send bucket 0 within 4 s" in str(alone.error)
    with pytest.raises(WeightSyncError, match="gave up before bucket 0"):
        send(sender, 3, gone=lambda: True)


def test_memory_that_is_not_there_is_an_error_at_once():
    with pytest.raises(OSError):
        Sender("shared_memory", slot_bytes=1 << 50, workers=1, device=CPU, timeout_s=1.0)


def test_shared_memory_has_no_name_once_every_worker_has_mapped_it(tmp_path):
    """So a run that is killed leaves nothing; until then the name says whose it is."""
    sender = Sender("shared_memory", slot_bytes=64, workers=1, device=CPU, timeout_s=30.0, directory=str(tmp_path))
    [file] = tmp_path.iterdir()
    assert f"-{os.getpid()}-" in file.name
    worker = Worker(sender.description(), 5)
    for number in range(5):
        sender.slot(lambda: False)[0] = number
        sender.send(1)
        assert not list(tmp_path.iterdir())
    worker.join(timeout=20)
    assert worker.error is None and worker.received == list(range(5))
    sender.close()


@pytest.mark.parametrize("rounding, mantissa", [("bf16", 7), ("fp8", 3)])
def test_matrices_are_rounded_to_the_nearest_value_that_the_format_holds(rounding, mantissa):
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    found, scale = round_matrix(matrix, rounding), 448 / matrix.abs().max() if rounding == "fp8" else 1.0
    step = 2.0 ** (torch.floor(torch.log2(matrix.abs() * scale)).clamp(min=-6) - mantissa)  # e4m3's least normal is 2^-6
    assert ((found - matrix).abs() * scale <= 0.5001 * step).all() and found.dtype == matrix.dtype
    steps = (found * scale / step)[matrix.abs() * scale >= 2**-6]
    assert ((steps - steps.round()).abs() < 1e-3).all(), "on the format's grid"
    assert not torch.equal(found, matrix) and torch.equal(round_matrix(found, rounding), found)
    assert torch.equal(round_matrix(matrix, "none"), matrix) and torch.equal(round_matrix(matrix[0], rounding), matrix[0])
    assert torch.equal(round_matrix(torch.zeros(2, 2), rounding), torch.zeros(2, 2))


def join_and_hang(description: dict) -> None:
    """A worker that connects, takes one bucket and then does nothing."""
    receiver = Receiver(description, CPU)
    receiver.begin(description["update"])
    receiver.receive(0, 8)
    receiver.taken(0)
    time.sleep(600)


def test_a_broadcast_to_a_worker_that_was_killed_fails_the_update_at_once():
    """As what it is, and not as a defect of the program, so that the engine is started again; long before any time-out."""
    sender = Sender("gloo", slot_bytes=8, workers=1, device=CPU, timeout_s=500)
    worker = multiprocessing.get_context("spawn").Process(target=join_and_hang, args=(sender.description(),), daemon=True)
    worker.start()
    began = time.monotonic()
    for _ in range(2):
        sender.slot(lambda: not worker.is_alive())
        sender.send(8)
    sender.slot(lambda: False)  # the worker has taken the first bucket, and will not take the second
    worker.kill()
    worker.join()
    call = Future()
    call.add_done_callback(sender.abort_if_failed)
    call.set_exception(RolloutError("the engine died"))  # ends a broadcast by NCCL; gloo's breaks with the connection
    sender.medium.move(2, 8)
    with pytest.raises(WeightSyncError, match="a broadcast of weights ended early"):
        sender.medium.slot(3)
    sender.close()
    assert time.monotonic() - began < 400
