"""The receiving end: methods that every vLLM worker gets (``worker_extension_cls``), tensor-parallel or not.

One call does a whole update - check, receive, load, finish - so no token is ever sampled between its parts. vLLM's own
start, update and finish calls leave the engine free to run in between, which kills it (vLLM 0.32).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from pmpo_megatron.bridge.buckets import Piece, bucket_bytes, covered, pieces_in, whole_tensors
from pmpo_megatron.bridge.channel import Receiver
from pmpo_megatron.bridge.fingerprint import fingerprint
from pmpo_megatron.rollout.vllm_child import ELSEWHERE
from pmpo_megatron.rollout.vllm_routes import RouteRecorder


class WeightReceiver(RouteRecorder):
    """Mixed into vLLM's worker, whose are ``self.model_runner``, ``model_config``, ``vllm_config`` and ``device``."""

    model_runner: Any
    model_config: Any
    vllm_config: Any
    device: torch.device
    pmpo_receiver: Receiver | None = None

    def pmpo_describe(self) -> dict[str, Any]:
        """What the other side has to know before it relies on this worker."""
        return {
            "version": getattr(self, "pmpo_version", 0),
            "elsewhere": ELSEWHERE in os.environ,
            "channel": self.pmpo_receiver.identity if self.pmpo_receiver is not None else None,
            "logprobs_mode": self.model_config.logprobs_mode,
        }

    def pmpo_receive_weights(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Loads the tensors of ``manifest`` into the model; returns fingerprints and how long it waited for buckets, or what
        is wrong.

        Nothing is touched unless names, shapes and count are those of the whole model. After a failure in the middle
        the model holds a mixture, and its version is -1.
        """
        problem = check_manifest(manifest)
        if problem:
            return {"problem": problem, "fingerprints": {}, "waited_s": 0.0}
        fingerprints: dict[str, int] = {}
        self.pmpo_version, self.pmpo_waited_s = -1, 0.0
        try:
            self._pmpo_reload(manifest, fingerprints)
            self.pmpo_version = manifest["version"]
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            if manifest["channel"] is not None and self.pmpo_receiver is not None:
                self.pmpo_receiver.fail()
        waited = self.pmpo_waited_s
        return {"problem": problem, "fingerprints": fingerprints, "waited_s": waited}

    def _pmpo_reload(self, manifest: dict[str, Any], fingerprints: dict[str, int]) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model_runner.model
        in_files = manifest["channel"] is None
        tensors = read_files(manifest["files"]) if in_files else whole_tensors(self._pmpo_receive(manifest))
        with set_current_vllm_config(self.vllm_config):  # as vLLM's worker does around a load: kernels are chosen by it
            _forget_packed_experts(model)
            initialize_layerwise_reload(model)
            try:
                model.load_weights(_noting(tensors, fingerprints, manifest["verify"]))
            finally:
                finalize_layerwise_reload(model, self.model_config)
            _pack_output_layer(model)

    def _pmpo_receive(self, manifest: dict[str, Any]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Everything in ``manifest``: views of a bucket, whose memory is given back when all of them are used."""
        channel = manifest["channel"]
        if self.pmpo_receiver is None or self.pmpo_receiver.identity != channel["identity"]:
            if self.pmpo_receiver is not None:
                self.pmpo_receiver.close()
            self.pmpo_receiver = Receiver(channel, self.device, elsewhere=ELSEWHERE in os.environ)
        self.pmpo_receiver.begin(channel["update"])
        for number, bucket in enumerate(manifest["buckets"]):
            began = time.monotonic()
            memory = self.pmpo_receiver.receive(number, bucket_bytes(bucket))
            self.pmpo_waited_s += time.monotonic() - began
            yield from pieces_in(bucket, memory)
            keep_what_waits(self.model_runner.model, memory)
            self.pmpo_receiver.taken(number)


def check_manifest(manifest: dict[str, Any]) -> str | None:
    """What is missing, extra or misshapen in ``manifest``, against the model's own list of tensors."""
    expected = {name: tuple(shape) for name, shape in manifest["expected"].items()}
    given, incomplete = covered(manifest["buckets"])
    if missing := sorted(expected.keys() - given.keys()):
        return f"missing: {', '.join(missing[:4])}"
    if extra := sorted(given.keys() - expected.keys()):
        return f"not in the model: {', '.join(extra[:4])}"
    if incomplete:
        return f"not every row comes once: {', '.join(incomplete[:4])}"
    for name, shape in given.items():
        if shape != expected[name]:
            return f"{name}: shape {shape} instead of {expected[name]}"
    return None


def read_files(paths: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of everything in safetensors files."""
    from safetensors import safe_open

    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def keep_what_waits(model: torch.nn.Module, memory: torch.Tensor) -> None:
    """Copies what vLLM has been given in ``memory`` and not yet loaded, because the bucket's memory is used again.

    vLLM 0.32 (reload/layerwise.py) holds on to tensors until all of a module have come; of modules with padding, until the end.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    place = memory.untyped_storage().data_ptr()
    calls = [call for module in model.modules() for _, call in get_layerwise_info(module).loaded_weights]
    for call in calls:
        for name, value in call.arguments.items():
            if not isinstance(value, torch.Tensor) or value.is_meta:
                continue
            if value.untyped_storage().data_ptr() == place:
                call.arguments[name] = value.clone()


def _noting(
    tensors: Iterator[tuple[str, torch.Tensor]], fingerprints: dict[str, int], mode: str
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        fingerprints[name] = fingerprint(tensor, mode)
        yield name, tensor


def _forget_packed_experts(model: Any) -> None:
    """vLLM 0.32 on CPU packs a mixture's experts when it makes their kernel, so that a reload leaves them unpacked: without a
    kernel it makes another. On GPUs the kernel stays: CUDA graphs hold its addresses.

    To be deleted when ``UnquantizedFusedMoEMethod`` packs at every reload.
    """
    for module in model.modules():
        if hasattr(module, "w13_weight") and module.w13_weight.device.type == "cpu":
            module.quant_method.moe_kernel = None


def _pack_output_layer(model: torch.nn.Module) -> None:
    """vLLM 0.32 on CPU: an output layer tied to the embedding keeps the packed copy of its first weights after a reload.

    To be deleted when ``finalize_layerwise_reload`` packs tied ``ParallelLMHead`` modules again.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and next(module.parameters()).device.type == "cpu":
            module.quant_method.process_weights_after_loading(module)
