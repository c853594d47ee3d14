"""What weights travel by: transports, buckets, fingerprints, and a channel whose ends come late, fail or go away."""

import multiprocessing
import os
import re
import threading
import time

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from pmpo_megatron.bridge.buckets import ALIGNMENT, Assembly, bucket_bytes, check_complete, pieces_in
from pmpo_megatron.bridge.channel import Receiver, Sender, end_early
from pmpo_megatron.bridge.config import choose_transport
from pmpo_megatron.bridge.fingerprint import FACTOR, fingerprint, weighted_sum
from pmpo_megatron.bridge.lanes import LanePlan, Shards
from pmpo_megatron.bridge.rounding import round_matrix
from pmpo_megatron.errors import ConfigError, WeightSyncError
from pmpo_megatron.hf.entries import decoder_entries
from pmpo_megatron.hf.shape import shape_of
from pmpo_megatron.rollout.engine import HERE

CPU = torch.device("cpu")
MIXTURE = dict(
    architectures=["Qwen2MoeForCausalLM"],
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    mlp_only_layers=[0],
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
)

ENTRIES = tuple(decoder_entries(shape_of(transformers.Qwen2MoeConfig(**MIXTURE).to_dict())))
BY_NAME = {entry.megatron: entry for entry in ENTRIES}
BOTH, OTHERS = (HERE, "node2"), ("node2", "node3")


@pytest.mark.parametrize(
    "device, hosts, expected",
    [
        ("cpu", (HERE,), "shared_memory"),
        ("cuda", (HERE,), "cuda_ipc"),
        ("cpu", OTHERS, "gloo"),
        ("cuda", OTHERS, "nccl"),
        ("cpu", BOTH, "shared_memory"),
        ("cuda", BOTH, "cuda_ipc"),
    ],
)
def test_the_transport_that_auto_means(device, hosts, expected):
    assert choose_transport("auto", device=device, hosts=hosts) == expected
    assert choose_transport("gloo", device=device, hosts=hosts) == "gloo"


@pytest.mark.parametrize(
    "transport, device, hosts, words",
    [
        ("nccl", "cpu", OTHERS, "needs a trainer on GPUs"),
        ("cuda_ipc", "cpu", (HERE,), "needs a trainer on GPUs"),
        ("cuda_ipc", "cuda", OTHERS, "cannot reach nodes of the engine's own"),
        ("shared_memory", "cpu", OTHERS, "cannot reach nodes of the engine's own"),
        ("nccl", "cuda", BOTH, "shares its GPU"),
    ],
)
def test_transports_that_cannot_work_are_refused(transport, device, hosts, words):
    with pytest.raises(ConfigError, match=words):
        choose_transport(transport, device=device, hosts=hosts)


@given(st.integers(1, 20_000), st.integers(1, 5), st.sampled_from([1, 2, 4]))
def test_whole_tensors_come_out_of_buckets_below_the_limit(limit, copies, shards):
    """Of ``copies`` replicas on a node, each of ``shards`` ranks."""
    held = [Shards((rank % shards, shards), (rank % shards, shards)) for rank in range(copies * shards)]
    plan = LanePlan(ENTRIES, held, [0] * len(held), ["0"], beside=True, dtype=torch.bfloat16, limit=limit)
    wholes = {e.megatron: torch.randn(e.full_shape).bfloat16() for e in ENTRIES}
    assembly, tensors, sent = Assembly(ENTRIES), {}, [0] * len(held)
    for lane, bucket in (each for turn in plan.turns for each in turn):
        one_row = len(bucket) == 1 and bucket[0]["shape"][0] == 1
        assert 0 < bucket_bytes(bucket) <= limit or one_row
        memory = torch.zeros(bucket_bytes(bucket), dtype=torch.uint8)
        sent[lane] += bucket_bytes(bucket)
        for piece, rows in pieces_in(bucket, memory):
            entry, (number, of) = BY_NAME[piece["name"]], held[lane].of_entry(BY_NAME[piece["name"]])
            assert (piece["shard"], piece["shards"]) == (number, of), "by a lane that holds it"
            rows.copy_(entry.shard(wholes[piece["name"]], number, of)[piece["start"] :][: len(rows)])
            assert rows.data_ptr() % ALIGNMENT == memory.data_ptr() % ALIGNMENT
            tensors |= dict(assembly.add(piece, rows.clone()))
    for entry in ENTRIES:
        for name, tensor in zip(entry.hf, entry.split(wholes[entry.megatron]), strict=True):
            assert torch.equal(tensors.pop(name), tensor)
    assert not tensors and check_complete(ENTRIES, [bucket for turn in plan.turns for _, bucket in turn]) is None
    assert max(sent) - min(sent) <= 2 * max(map(bucket_bytes, sum(map(plan.share, range(len(held))), [])))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda buckets: buckets[0].pop(0), "missing: decoder|missing: embedding"),
        (lambda buckets: buckets[0][0].update(name="decoder.layers.9.x"), "missing: embedding"),
        (
            lambda buckets: buckets.append([dict(buckets[0][0], name="decoder.layers.9.x")]),
            "not in the model: decoder.layers.9.x",
        ),
        (lambda buckets: buckets.append(buckets[0]), "not every row comes once"),
        (lambda buckets: buckets[-1][-1].update(start=1), "not every row comes once"),
        (lambda buckets: buckets[-1][-1].update(shape=[64, 3]), r"shape \[64, 3\], where a shard of 1 has"),
        (lambda buckets: buckets[-1][-1].update(shards=2), "not every row comes once|shape"),
    ],
)
def test_what_is_not_the_whole_model_is_refused(change, words):
    plan = LanePlan(ENTRIES, [Shards((0, 1), (0, 1))], [0], ["0"], beside=True, dtype=torch.float32, limit=10**6)
    buckets = [[dict(piece) for piece in bucket] for turn in plan.turns for _, bucket in turn]
    assert check_complete(ENTRIES, buckets) is None
    change(buckets)
    assert re.search(words, check_complete(ENTRIES, buckets))


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
                self.received.append(int(receiver.receive(1)[0]))
                receiver.taken()
        except Exception as error:
            self.error = error


def send(sender, count):
    for number in range(count):
        sender.slot()[0] = number
        sender.send(1)


def open_sender(kind, *, workers=2, timeout_s=30.0):
    return Sender(kind, slot_bytes=64, workers=workers, device=CPU, timeout_s=timeout_s)


@pytest.mark.parametrize("kind", ["shared_memory", "gloo"])
def test_every_worker_gets_every_bucket_also_one_that_is_slow(kind):
    sender = open_sender(kind)
    description = sender.begin()
    workers = [Worker(description, 7), Worker(description, 7, at=2, trouble=lambda receiver: time.sleep(0.5))]
    send(sender, 7)
    for worker in workers:
        worker.join(timeout=100)
        assert worker.error is None and worker.received == list(range(7))
    assert sender.sent_bytes == 7
    sender.finish()
    sender.close()


def fail(receiver):
    receiver.fail("bad tensor")
    raise RuntimeError("bad tensor")


def test_a_worker_that_fails_ends_the_update_for_all_at_once_and_says_why():
    sender = open_sender("shared_memory")
    description = sender.begin()
    bad, good = Worker(description, 9, at=3, trouble=fail), Worker(description, 9)
    with pytest.raises(WeightSyncError, match="the update was given up: bad tensor"):
        send(sender, 9)
    sender.fail("another reason")
    for worker in (bad, good):
        worker.join(timeout=100)
    assert "given up: bad tensor" in str(good.error), "the first reason"


def test_workers_that_do_not_come_are_counted_and_waits_are_bounded():
    sender = open_sender("shared_memory", timeout_s=4.0)
    alone = Worker(sender.begin(), 3)
    with pytest.raises(WeightSyncError, match="1 of 2 rollout workers came to bucket 0 in 4 s"):
        send(sender, 3)
    alone.join(timeout=100)
    assert "did not send bucket 0 within 4 s" in str(alone.error)


def test_who_only_knows_a_lane_can_end_its_update_and_not_the_next_one():
    sender = open_sender("shared_memory", workers=1)
    description = sender.begin()
    end_early(description, "the engine died")
    with pytest.raises(WeightSyncError, match="given up: the engine died"):
        send(sender, 3)
    worker = Worker(sender.begin(), 3)
    end_early(description, "the engine died")
    send(sender, 3)
    worker.join(timeout=100)
    assert worker.error is None and worker.received == [0, 1, 2]
    sender.close()
    del sender
    end_early(description, "nobody is there any more")


def test_memory_that_is_not_there_is_an_error_at_once():
    with pytest.raises(OSError):
        Sender("shared_memory", slot_bytes=1 << 50, workers=1, device=CPU, timeout_s=1.0)


def test_shared_memory_has_no_name_once_every_worker_has_mapped_it(tmp_path):
    """So a run that is killed leaves nothing; until then the name says whose it is."""
    sender = Sender("shared_memory", slot_bytes=64, workers=1, device=CPU, timeout_s=30.0, directory=str(tmp_path))
    [file] = tmp_path.iterdir()
    assert f"-{os.getpid()}-" in file.name
    worker = Worker(sender.begin(), 5)
    for number in range(5):
        sender.slot()[0] = number
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
    receiver.receive(8)
    receiver.taken()
    time.sleep(600)


def test_a_broadcast_to_a_worker_that_was_killed_fails_the_update_at_once():
    """As what it is, and not as a defect of the program, so that the engine is started again; long before any time-out."""
    sender = Sender("gloo", slot_bytes=8, workers=1, device=CPU, timeout_s=500)
    description = sender.begin()
    worker = multiprocessing.get_context("spawn").Process(target=join_and_hang, args=(description,), daemon=True)
    worker.start()
    began = time.monotonic()
    for _ in range(2):
        sender.slot()
        sender.send(8)
    sender.slot()  # the worker has taken the first bucket, and will not take the second
    worker.kill()
    worker.join()
    end_early(description, "the engine died")  # ends a broadcast by NCCL, from a thread; gloo's breaks with the connection
    sender.medium.move(2, 8)
    with pytest.raises(WeightSyncError, match="a broadcast of weights ended early"):
        sender.medium.slot(3)
    sender.close()
    assert time.monotonic() - began < 400
