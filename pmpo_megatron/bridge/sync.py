"""Pushing a policy's weights into the rollout engine: streamed, atomic to the engine, verified."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pmpo_megatron.bridge.config import BridgeConfig
from pmpo_megatron.bridge.fingerprint import fingerprint
from pmpo_megatron.bridge.source import WeightSource
from pmpo_megatron.errors import WeightSyncError
from pmpo_megatron.hf.safetensors import SafetensorsWriter
from pmpo_megatron.model.policy import Policy
from pmpo_megatron.parallel.collectives import broadcast_object
from pmpo_megatron.rollout.engine import RolloutEngine

logger = logging.getLogger(__name__)
ALIGNMENT = 64


@dataclass(frozen=True)
class PushReport:
    """What an update moved, and whether every tensor's fingerprint was compared."""

    version: int
    seconds: float
    bytes: int
    tensors: int
    verify: str


class WeightBridge:
    """Keeps an engine's weights those of a policy. Every rank has one; the engine exists on rank 0, None elsewhere.

    The bytes of the newest update stay where the engine read them, so that an engine that was started again gets them
    from rank 0 alone, without the other ranks.
    """

    def __init__(self, policy: Policy, engine: RolloutEngine | None, config: BridgeConfig) -> None:
        self.policy, self.engine, self.config = policy, engine, config
        self.active = broadcast_object(engine is not None and engine.holds_weights, policy.state)
        self.source = WeightSource(policy) if self.active else None
        self._manifest: dict[str, Any] | None = None
        self._fingerprints: dict[str, int] = {}
        self._directory: Path | None = None
        self._buffer: torch.Tensor | None = None
        if engine is not None:
            engine.on_restart = self._restore

    def push(self, version: int) -> PushReport:
        """Brings the engine to this policy's weights and calls them ``version``. Collective.

        Raises:
            WeightSyncError: on every rank: what arrived is not what was sent, or the engine failed; names tensor and
                the engine's rank. The engine refuses to generate until a later push succeeds.
        """
        started = time.monotonic()
        if not self.active:
            if self.engine is not None:
                self.engine.version = version
            return PushReport(version, 0.0, 0, 0, "off")
        error, report = None, None
        stream = iter(self.source)
        if self.engine is None:
            for _ in stream:
                raise AssertionError("only rank 0 receives tensors")
        else:
            self.engine.mark_broken("an update is under way")
            try:
                self._write(stream, version)
                self._deliver()
                self.engine.version = version
                self.engine.mark_broken(None)
            except WeightSyncError as failure:
                error = str(failure)
                self.engine.mark_broken(error)
                for _ in stream:  # the other ranks are still sending
                    pass
            report = PushReport(version, time.monotonic() - started, self._bytes, len(self._fingerprints), self.config.verify)
        error, report = broadcast_object((error, report), self.policy.state)
        if error is not None:
            raise WeightSyncError(error)
        return report

    def close(self) -> None:
        """Removes the files of the transport."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = self._buffer = None

    @property
    def _bytes(self) -> int:
        return self._manifest["bytes"] if self._manifest else 0

    def _write(self, stream, version: int) -> None:
        """Puts the tensors where the engine reads them, noting their fingerprints before anything can go wrong."""
        if self._directory is None:
            root = self.config.directory or ("/dev/shm" if self.config.transport == "shared_memory" else None)
            self._directory = Path(tempfile.mkdtemp(prefix="pmpo-weights-", dir=root))
        self._fingerprints = {}
        expected = {name: list(shape) for name, shape in self.policy.mapping.hf_shapes.items()}
        common = {"version": version, "expected": expected}
        common |= {"transport": self.config.transport, "verify": self.config.verify}
        try:
            write = self._write_buffer if self.config.transport == "shared_memory" else self._write_files
            self._manifest = common | write(stream)
        except OSError as error:
            raise WeightSyncError(f"{self._directory}: cannot hold the weights: {error}") from None

    def _write_buffer(self, stream) -> dict[str, Any]:
        path = self._directory / "weights"
        dtype = next(iter(self.source.parameters.values())).dtype
        offsets, size = {}, 0
        for name, shape in self.policy.mapping.hf_shapes.items():
            offsets[name] = size
            size += -(-torch.Size(shape).numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if self._buffer is None:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a full /dev/shm says so here, not by SIGBUS later
            # Mapped once: mapping anew costs a page fault for every 4 KiB, more than the copy.
            self._buffer = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        buffer = self._buffer
        tensors = []
        for name, tensor in stream:
            self._fingerprints[name] = fingerprint(tensor, self.config.verify)
            data = tensor.contiguous().view(-1).view(torch.uint8)
            buffer[offsets[name] : offsets[name] + data.numel()] = data
            tensors.append(
                {
                    "name": name,
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "shape": list(tensor.shape),
                    "offset": offsets[name],
                }
            )
        return {"path": str(path), "bytes": size, "tensors": tensors}

    def _write_files(self, stream) -> dict[str, Any]:
        for old in self._directory.glob("*.safetensors*"):
            old.unlink()
        writer, size, tensors = SafetensorsWriter(self._directory), 0, []
        for name, tensor in stream:
            self._fingerprints[name] = fingerprint(tensor, self.config.verify)
            size += tensor.numel() * tensor.element_size()
            tensors.append({"name": name, "shape": list(tensor.shape)})
            writer.add(name, tensor)
        writer.finish()
        files = sorted(str(path) for path in self._directory.glob("*.safetensors"))
        return {"files": files, "bytes": size, "tensors": tensors}

    def _deliver(self) -> None:
        """Has every worker load what was written, compares fingerprints, and drops what was cached under old weights."""
        for answer in self.engine.collective_rpc("pmpo_receive_weights", self._manifest):
            who = f"rollout worker {answer['rank']}"
            if answer["problem"]:
                raise WeightSyncError(f"{who}: {answer['problem']}")
            for name, sent in self._fingerprints.items():
                if answer["fingerprints"].get(name) != sent:
                    raise WeightSyncError(f"{who}: {name} is not what was sent (its fingerprint differs)")
        self.engine.reset_prefix_cache()

    def _restore(self, engine: RolloutEngine) -> None:
        """Gives an engine that was started again the newest weights."""
        if self._manifest is None:
            return
        engine.mark_broken("it was started again and has the weights of its checkpoint")
        self._deliver()
        engine.mark_broken(None)
