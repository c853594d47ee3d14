"""Pushing a policy's weights into the rollout engine: streamed, atomic to the engine, verified; again if it was restarted."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pmpo_megatron.bridge.buckets import bucket_bytes, pieces_in, plan_buckets
from pmpo_megatron.bridge.channel import Sender
from pmpo_megatron.bridge.config import ON_GPU, BridgeConfig, choose_transport
from pmpo_megatron.bridge.fingerprint import fingerprint
from pmpo_megatron.bridge.media import FILES, SHARED_MEMORY
from pmpo_megatron.bridge.source import WeightSource, give_back_cache
from pmpo_megatron.errors import RolloutError, WeightSyncError
from pmpo_megatron.hf.safetensors import SafetensorsWriter
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.parallel.collectives import broadcast_object
from pmpo_megatron.parallel.processes import address_toward, owned_prefix, sweep
from pmpo_megatron.parallel.stand_by import StandBy
from pmpo_megatron.rollout.engine import HERE, RolloutEngine

logger = logging.getLogger(__name__)
ATTEMPTS = 2  # an engine that dies while it takes weights is started again, once
Stream = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class PushReport:
    """What an update moved, and whether every tensor's fingerprint was compared.

    ``waited_s`` of ``seconds`` is what the slowest of the engine's workers waited for weights; the rest of the time it loaded
    them, which no transport makes shorter.
    """

    version: int
    seconds: float
    waited_s: float
    bytes: int
    tensors: int
    verify: str


class WeightBridge:
    """Keeps an engine's weights those of a policy. Every rank has one; the engine exists on rank 0, None elsewhere.

    Weights are streamed from all ranks, so an engine that was started again in the middle of a batch needs all ranks to get
    them: whatever generates runs in ``stand_by``, where they wait for it.
    """

    def __init__(self, policy: Policy, engine: RolloutEngine | None, config: BridgeConfig, stand_by: StandBy) -> None:
        self.policy, self.engine, self.config = policy, engine, config
        hosts = broadcast_object(engine.hosts if engine is not None else None, policy.state)
        self.active = bool(hosts)  # recorded rollouts hold no weights
        self.version: int | None = None  # nothing was pushed yet
        self._push_again = stand_by.offer(lambda: self.push(self.version or 0))
        self._outbox = _Outbox(engine, policy, config) if engine is not None else None
        if self.active:
            device = policy.state.device
            self.transport = choose_transport(config.transport, device=device.type, hosts=hosts)
            self.source = WeightSource(policy, device if self.transport in ON_GPU else torch.device("cpu"), config.rounding)
        if engine is not None:
            engine.on_restart = self._ask_for_weights

    def push(self, version: int) -> PushReport:
        """Brings the engine to this policy's weights and calls them ``version``. Collective.

        Raises:
            WeightSyncError: on every rank: what arrived is not what was sent, or the engine failed; names tensor and
                the engine's rank. The engine refuses to generate until a later push succeeds.
        """
        self.version, started = version, time.monotonic()
        give_back_cache(self.policy.state.device)
        if not self.active:
            if self.engine is not None:
                with self.engine.update(version):
                    pass
            return PushReport(version, 0.0, 0.0, 0, 0, "off")
        for attempt in range(1, ATTEMPTS + 1):
            outcome = self._push_once(version, last=attempt == ATTEMPTS)
            error, again, waited_s = broadcast_object(outcome, self.policy.state)
            if not again:
                break
        if error is not None:
            raise WeightSyncError(error)
        shapes = self.policy.mapping.hf_shapes.values()
        size = sum(torch.Size(shape).numel() for shape in shapes) * self.source.dtype.itemsize
        return PushReport(version, time.monotonic() - started, waited_s, size, len(shapes), self.config.verify)

    def close(self) -> None:
        """Gives the transport's memory and files back."""
        if self._outbox is not None:
            self._outbox.close()

    def _ask_for_weights(self, engine: RolloutEngine) -> None:
        """Called by the thread that generates, after the engine was started again: waits until it has the newest weights."""
        if not self.active or self.version is None:
            return
        if not self._push_again():
            raise RolloutError("the run ended before the engine, which was started again, got its weights")

    def _push_once(self, version: int, *, last: bool) -> tuple[str | None, bool, float]:
        """(what went wrong, whether to try again, `PushReport.waited_s`) on rank 0; every rank joins the stream to its end."""
        stream = iter(self.source)
        if self._outbox is None:
            for _ in stream:
                raise AssertionError("only rank 0 receives tensors")
            return None, False, 0.0
        error, again, waited_s = None, False, 0.0
        try:
            with self._outbox.engine.update(version):
                waited_s = self._outbox.deliver(stream, self.transport, self.source, version)
        except (WeightSyncError, RolloutError) as failure:
            error, again = str(failure), isinstance(failure, RolloutError) and not last
            self._outbox.close()
            for _ in stream:  # the other ranks are still sending
                pass
        if again:
            logger.warning("the engine failed while it took weights: %s; starting it again", error)
            again = _revive(self._outbox.engine)
        return error, again, waited_s


class _Outbox:
    """Rank 0's part of an update: tensors into buckets or files, the call that has the workers take them, what they answer."""

    def __init__(self, engine: RolloutEngine, policy: Policy, config: BridgeConfig) -> None:
        self.engine, self.config, self.shapes = engine, config, policy.mapping.hf_shapes
        self.device = policy.state.device
        self._sender: Sender | None = None
        self._directory: Path | None = None
        for place in (config.directory,) if config.directory else (SHARED_MEMORY, tempfile.gettempdir()):
            sweep(FILES, place)

    def deliver(self, stream: Stream, transport: str, source: WeightSource, version: int) -> float:
        """Has every worker load the tensors of ``stream``, and compares fingerprints.

        Returns:
            seconds that the slowest worker waited for tensors.

        Raises:
            WeightSyncError: what arrived is not what was sent, or there is no room for what is sent.
            RolloutError: the engine died or does not answer.
        """
        buckets = plan_buckets(self.shapes, source.dtype, int(self.config.bucket_mib * 2**20))
        expected = {name: list(shape) for name, shape in self.shapes.items()}
        manifest = {"version": version, "verify": self.config.verify, "expected": expected, "buckets": buckets}
        try:
            if transport == "disk":
                sent, files = self._write_files(stream)
                answers = self._call(manifest | {"channel": None, "files": files})
            else:
                sent, answers = self._stream(stream, transport, manifest)
        except OSError as error:
            raise WeightSyncError(f"no room for the weights on their way to the engine: {error}") from None
        for worker, answer in enumerate(answers):
            self._check(worker, answer, sent)
        return max(answer["waited_s"] for answer in answers)

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _call(self, manifest: dict[str, Any]) -> list[dict[str, Any]]:
        return self.engine.collective_rpc("pmpo_receive_weights", manifest)

    def _check(self, worker: int, answer: dict[str, Any], sent: dict[str, int]) -> None:
        who = f"rollout worker {worker}"
        if answer["problem"]:
            raise WeightSyncError(f"{who}: {answer['problem']}")
        for name, value in sent.items():
            if answer["fingerprints"].get(name) != value:
                raise WeightSyncError(f"{who}: {name} is not what was sent (its fingerprint differs)")

    def _stream(self, stream: Stream, transport: str, manifest: dict[str, Any]) -> tuple[dict[str, int], list[dict[str, Any]]]:
        """(fingerprints of what was sent, the workers' answers). The call runs in a thread while buckets are filled here."""
        sender = self._ready_sender(transport, max(map(bucket_bytes, manifest["buckets"])))
        manifest = manifest | {"channel": sender.description()}
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights") as thread:
            call = thread.submit(self._call, manifest)
            call.add_done_callback(sender.abort_if_failed)
            try:
                sent = self._send(stream, sender, manifest["buckets"], call)
            except BaseException as error:
                sender.give_up()
                problem = self._why_given_up(call)
                if isinstance(error, WeightSyncError) and problem is not None:
                    raise WeightSyncError(problem) from None
                raise
            answers = call.result()
        sender.finish()
        return sent, answers

    @staticmethod
    def _why_given_up(call: Future) -> str | None:
        """What the workers say, who end because of `Sender.give_up`; the first that failed by itself comes first."""
        problems = [f"rollout worker {n}: {answer['problem']}" for n, answer in enumerate(call.result()) if answer["problem"]]
        return min(problems, key=lambda text: "the trainer gave up" in text, default=None)

    def _send(self, stream: Stream, sender: Sender, buckets: list, call: Future) -> dict[str, int]:
        sent: dict[str, int] = {}
        for bucket in buckets:
            memory = sender.slot(call.done)
            for piece, target in pieces_in(bucket, memory):
                start, end = piece["rows"]
                if start == 0:
                    name, tensor = next(stream)
                    assert name == piece["name"], f"{name} comes where {piece['name']} is due"
                    sent[name] = fingerprint(tensor, self.config.verify)
                target.copy_(tensor[start:end])
            sender.send(bucket_bytes(bucket))
        assert next(stream, None) is None, "not every tensor was sent"
        return sent

    def _ready_sender(self, transport: str, slot_bytes: int) -> Sender:
        """The channel that all present workers know, or a new one."""
        workers = self.engine.collective_rpc("pmpo_describe")
        if self._sender is not None and {worker["channel"] for worker in workers} != {self._sender.identity}:
            self.close()
        if self._sender is None:
            self._sender = Sender(
                transport,
                slot_bytes=slot_bytes,
                workers=len(workers),
                elsewhere=sum(w["elsewhere"] for w in workers),
                device=self.device,
                timeout_s=self.config.timeout_s,
                address=self._address(),
                directory=self.config.directory,
            )
        return self._sender

    def _address(self) -> str | None:
        """Where workers on other nodes reach this one; None if there are none."""
        others = [host for host in self.engine.hosts if host != HERE]
        return (self.config.address or address_toward(others[0])) if others else None

    def _write_files(self, stream: Stream) -> tuple[dict[str, int], list[str]]:
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix=owned_prefix(FILES), dir=self.config.directory))
        for old in self._directory.glob("*.safetensors*"):
            old.unlink()
        writer, sent = SafetensorsWriter(self._directory), {}
        for name, tensor in stream:
            sent[name] = fingerprint(tensor, self.config.verify)
            writer.add(name, tensor)
        writer.finish()
        return sent, sorted(str(path) for path in self._directory.glob("*.safetensors"))


def _revive(engine: RolloutEngine) -> bool:
    try:
        engine.revive()
    except RolloutError as failure:
        logger.error("%s", failure)
        return False
    return True
