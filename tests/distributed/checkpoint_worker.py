"""What the processes of test_checkpoint.py run."""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import torch

from pmpo_megatron.algo.objective import PRESETS
from pmpo_megatron.checkpoint import files, save
from pmpo_megatron.checkpoint.config import CheckpointConfig
from pmpo_megatron.checkpoint.index import read_index
from pmpo_megatron.checkpoint.space import bytes_of
from pmpo_megatron.checkpoint.store import CheckpointStore
from pmpo_megatron.errors import CheckpointError
from pmpo_megatron.model.optimizer import OptimizerConfig
from pmpo_megatron.model.policy import ModelConfig, Policy
from pmpo_megatron.model.step import optimizer_step, score
from pmpo_megatron.parallel.state import ParallelConfig, initialize, shut_down
from tests.distributed.parity_worker import TEMPERATURE, prepared
from tests.weights import whole_weights

OPTIMIZER = OptimizerConfig(learning_rate=0.003, warmup_steps=3)


class Run:
    """A policy on one layout that takes the same optimizer steps on every layout."""

    def __init__(self, path: str, root: str, layout: dict, **checkpoint) -> None:
        self.parallel = ParallelConfig(**layout)
        self.state = initialize(self.parallel, device="cpu", seed=3)
        self.policy = Policy.build(ModelConfig(path=path, log_prob_chunk=16), OPTIMIZER, self.parallel, self.state)
        self.store = CheckpointStore(root, CheckpointConfig(keep=2, **checkpoint), self.policy)

    def train(self, steps: int) -> None:
        batches = prepared(self.state)
        for _ in range(steps):
            scored = score(self.policy, batches, temperature=TEMPERATURE)
            for _ in range(2):
                optimizer_step(self.policy, scored, objective=PRESETS["pmpo"], progress=0.0, temperature=TEMPERATURE)

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole tensors by Hugging Face name on rank 0."""
        return whole_weights(self.policy)

    def random_numbers(self) -> list[float]:
        return [float(torch.rand(())), float(np.random.random())]


def save_and_go_on(path: str, root: str, layout: dict) -> dict:
    """Two rounds, a save, two more: the reference for every continued run."""
    run = Run(path, root, layout)
    run.train(2)
    assert run.store.save(2, {"round": 2, "note": "kept"}, required=True)
    numbers = run.random_numbers()
    saved = run.weights()
    run.train(2)
    found = {"saved": saved, "weights": run.weights(), "numbers": numbers, "updates": run.policy.scheduler.num_updates}
    shut_down()
    return found


def save_while_training(path: str, root: str, layout: dict) -> dict:
    """As `save_and_go_on`, but written by a thread while the next rounds change the weights."""
    run = Run(path, root, layout, asynchronous=True)
    run.train(2)
    saved = run.weights()
    assert run.store.save(2, {"round": 2, "note": "kept"})
    unfinished = sorted(p.name for p in Path(root).iterdir())
    run.train(2)
    run.store.poll()
    run.store.wait()
    found = {"saved": saved, "weights": run.weights(), "unfinished": unfinished}
    found["finished"] = sorted(p.name for p in Path(root).iterdir())
    shut_down()
    return found


def go_on(path: str, root: str, layouts: list[dict]) -> list[dict]:
    """For each layout: a fresh policy, the newest checkpoint, two more rounds."""
    found = []
    for layout in layouts:
        run = Run(path, root, layout)
        torch.rand(100), np.random.random(100)  # a resumed process has drawn other numbers
        progress = run.store.load_latest()
        loaded, numbers = run.weights(), run.random_numbers()
        run.train(2)
        found.append(
            {
                "progress": progress,
                "loaded": loaded,
                "weights": run.weights(),
                "numbers": numbers,
                "updates": run.policy.scheduler.num_updates,
            }
        )
        shut_down(keep_world=True)
    shut_down()
    return found


def retention(path: str, root: str) -> dict:
    """Five saves with two kept; then a damaged newest one, then all damaged."""
    run = Run(path, root, {})
    assert run.store.save(0, {"round": 0}) and not Path(root).exists(), "nothing to save before the first update"
    run.train(1)
    for number in range(1, 6):
        run.store.save(number, {"round": number}, required=True)
    names = sorted(p.name for p in Path(root).iterdir())
    newest = Path(root) / names[-1]
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    second = run.store.load_latest()
    (Path(root) / names[0] / "progress.json").unlink()
    try:
        run.store.load_latest()
        error = None
    except CheckpointError as failure:
        error = str(failure)
    shut_down()
    return {"names": names, "second": second, "error": error}


def foreign_names(path: str, root: str) -> dict:
    """Copies and links that a user makes beside the checkpoints, while saves and a load go on."""
    run, place = Run(path, root, {}), Path(root)
    run.train(1)
    run.store.save(1, {"round": 1}, required=True)
    for name in ("round-best", "round-best-2", "round-00000006.bak"):
        shutil.copytree(place / "round-00000001", place / name)
    (place / "round-latest").symlink_to("round-00000001")
    for number in (2, 3, 4):
        run.store.save(number, {"round": number}, required=True)
    progress = run.store.load_latest()
    found = {"names": sorted(p.name for p in place.iterdir()), "progress": progress}
    shut_down()
    return found


def broken_records(path: str, root: str) -> list[str]:
    """The newest checkpoint's manifest, progress and index replaced by other things: which round each load falls back to."""
    run, place = Run(path, root, {}), Path(root)
    run.train(1)
    for number in (1, 2):
        run.store.save(number, {"round": number}, required=True)
    newest, found = place / "round-00000002", []
    whole = {name: (newest / name).read_bytes() for name in ("manifest.json", "progress.json", "megatron/.metadata")}
    crafted = pickle.dumps(os.getcwd)  # a function that is no description of a tensor
    changes = [
        ("manifest.json", text) for text in (b"[]", b'{"files": {}}', b'{"files": {"../x": [1, 2]}}', b'{"files": {"x": 5}}')
    ]
    changes += [("progress.json", b"[1]"), ("progress.json", b"{"), ("megatron/.metadata", crafted)]
    for name, content in changes:
        (newest / name).write_bytes(content)
        if name != "manifest.json":  # whoever changed it took its checksum again
            described = json.loads(whole["manifest.json"])["files"] | files.describe_files(newest, [newest / name])
            files.write_manifest(newest, described)
        found.append((name, run.store.load_latest()["round"]))
        for other, content in whole.items():
            (newest / other).write_bytes(content)
    found.append(("nothing", run.store.load_latest()["round"]))
    shut_down()
    return found


def removed_directory(path: str, root: str) -> dict:
    """``checkpoints`` is removed between saves, and once while one is written; the run goes on."""
    run, place = Run(path, root, {}), Path(root)
    run.train(1)
    run.store.save(1, {"round": 1}, required=True)
    shutil.rmtree(place)
    again = run.store.save(2, {"round": 2})
    shutil.rmtree(place)
    same = run.store.save(2, {"round": 2}, required=True)
    there = sorted(p.name for p in place.iterdir())
    original = files.write_manifest
    files.write_manifest = lambda *_: shutil.rmtree(place) or original(*_)
    during = run.store.save(3, {"round": 3})
    files.write_manifest = original
    after = run.store.save(4, {"round": 4}, required=True)
    found = {
        "again": again,
        "same": same,
        "there": there,
        "during": during,
        "after": after,
        "progress": run.store.load_latest(),
    }
    shut_down()
    return found


def space(path: str, root: str) -> dict:
    """The bytes that a checkpoint was said to need, what it has, and saves where one less is free."""
    run, place = Run(path, root, {}), Path(root)
    run.train(1)
    needed, free = bytes_of(run.policy), files.free_bytes
    files.free_bytes = lambda path: needed - 1
    first = run.store.save(1, {"round": 1})
    files.free_bytes = free
    run.store.save(1, {"round": 1}, required=True)
    size = sum(p.stat().st_size for p in (place / "round-00000001/megatron").glob("*.distcp"))
    index = read_index(place / "round-00000001/megatron/.metadata").state_dict_metadata.values()
    stored = sum(math.prod(v.size) * v.properties.dtype.itemsize for v in index if hasattr(v, "size"))
    files.free_bytes = lambda path: needed - 1
    second = run.store.save(2, {"round": 2})
    try:
        run.store.save(2, {"round": 2}, required=True)
        error = None
    except CheckpointError as failure:
        error = str(failure)
    files.free_bytes = free
    left = sorted(p.name for p in place.iterdir())
    shut_down()
    return {"needed": needed, "stored": stored, "size": size, "saves": [first, second], "error": error, "left": left}


def stopped_while_saving(path: str, root: str) -> None:
    """Rank 1 is stopped where Megatron plans the checkpoint, in collectives of its own."""
    run = Run(path, root, {"stall_s": 3.0, "heartbeat_s": 0.5})
    run.train(1)
    if run.state.rank == 1:
        save.plan = lambda *_, **__: os.kill(os.getpid(), signal.SIGSTOP)
    run.store.save(1, {"round": 1}, required=True)


def full_disk(path: str, root: str) -> dict:
    """A save that the system refuses to write (a limit on file sizes stands for a full disk), and the state after it."""
    run = Run(path, root, {})
    run.train(1)
    run.store.save(1, {"round": 1}, required=True)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    saved = run.store.save(2, {"round": 2})
    try:
        run.store.save(2, {"round": 2}, required=True)
        error = None
    except CheckpointError as failure:
        error = str(failure)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    left = sorted(p.name for p in Path(root).iterdir())
    again = run.store.save(3, {"round": 3})
    progress = run.store.load_latest()
    shut_down()
    return {"saved": saved, "error": error, "left": left, "again": again, "progress": progress}


def optimizer_bytes(path: str, root: str) -> dict:
    """Bytes of the optimizer's state that this rank holds for a save, and makes room for to load; and what it owns."""
    run = Run(path, root, {})
    run.train(1)
    found = {}
    for is_loading in (False, True):
        sharded = save.sharded_state(run.policy, is_loading=is_loading)
        state = sharded["optimizer_states"][0] if is_loading else sharded["optimizer"]["param_state"]
        tensors = [entry.data for states in (state or {}).values() for entry in states.values()]
        found["loading" if is_loading else "saving"] = sum(t.numel() * t.itemsize for t in tensors)
        assert all(tensor.device.type == "cpu" for tensor in tensors)
    # Of the last state, which is to be read: gate and up are apart in it, and stand twice in memory when they are put together.
    projections = [entry.data for states in state.values() for entry in states.values() if "linear_fc1" in entry.key]
    found["together"] = found["loading"] + sum(t.numel() * t.itemsize for t in projections)
    optimizer = run.policy.optimizer.chained_optimizers[0]
    found["owned"] = 3 * sum(p.numel() * p.itemsize for group in optimizer.param_groups for p in group["params"])
    found["largest"] = 3 * max(p.numel() * 4 for _, p in run.policy.named_parameters())
    found["whole"] = 3 * sum(p.numel() * 4 for _, p in run.policy.named_parameters())
    shut_down()
    return found
