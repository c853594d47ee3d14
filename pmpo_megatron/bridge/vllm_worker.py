"""The receiving end: methods that every vLLM worker gets (``worker_extension_cls``), tensor-parallel or not.

One call does a whole update - check, receive, load, finish - so no token is ever sampled between its parts. vLLM's own
start, update and finish calls leave the engine free to run in between, which kills it (vLLM 0.32).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from pmpo_megatron.bridge.buckets import Assembly, bucket_bytes, check_complete, pieces_in, title
from pmpo_megatron.bridge.channel import Receiver
from pmpo_megatron.bridge.fingerprint import fingerprint
from pmpo_megatron.bridge.rounding import round_matrix
from pmpo_megatron.hf.mapping import WeightMapping
from pmpo_megatron.hf.shape import read_shape
from pmpo_megatron.rollout.vllm_child import NODE
from pmpo_megatron.rollout.vllm_routes import RouteRecorder

if TYPE_CHECKING:
    from pmpo_megatron.bridge.lanes import Turn
    from pmpo_megatron.hf.entries import Entry


class WeightReceiver(RouteRecorder):
    """Mixed into vLLM's worker, whose are ``self.model_runner``, ``model_config``, ``vllm_config`` and ``device``."""

    model_runner: Any
    model_config: Any
    vllm_config: Any
    device: torch.device
    pmpo_channel: str | None = None  # the trainer's name for `pmpo_lanes` and `pmpo_turns`
    pmpo_lanes: Mapping[int, Receiver] = MappingProxyType({})
    pmpo_turns: tuple[tuple[Entry, ...], list[Turn]]  # all parameters, and the buckets that have them

    def pmpo_describe(self) -> dict[str, Any]:
        """What the other side has to know before it relies on this worker."""
        return {
            "version": getattr(self, "pmpo_version", 0),
            "node": os.environ.get(NODE, "0"),
            "channel": self.pmpo_channel,
            "logprobs_mode": self.model_config.logprobs_mode,
        }

    def pmpo_receive_weights(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Loads the pieces of ``manifest`` into the model; returns their fingerprints and how long it waited for buckets, or
        what is wrong.

        Nothing is touched unless they are the whole model. After a failure in the middle the model holds a mixture, and its
        version is -1.
        """
        problem: str | None = None
        fingerprints: dict[str, int] = {}
        if manifest["turns"] is not None:
            entries = WeightMapping(read_shape(self.model_config.model)).entries
            if problem := check_complete(entries, [bucket for turn in manifest["turns"] for _, bucket in turn]):
                return {"problem": problem, "fingerprints": {}, "waited_s": 0.0}
            self.pmpo_turns = entries, manifest["turns"]
        self.pmpo_version, self.pmpo_waited_s = -1, 0.0
        try:
            self._pmpo_reload(self._pmpo_receive(manifest, fingerprints))
            self.pmpo_version = manifest["version"]
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            for lane in self.pmpo_lanes.values():
                lane.fail(problem)
        return {"problem": problem, "fingerprints": fingerprints, "waited_s": self.pmpo_waited_s}

    def _pmpo_reload(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model_runner.model
        with set_current_vllm_config(self.vllm_config):  # as vLLM's worker does around a load: kernels are chosen by it
            _forget_packed_experts(model)
            initialize_layerwise_reload(model)
            try:
                model.load_weights(tensors)
            finally:
                finalize_layerwise_reload(model, self.model_config)
            _pack_output_layer(model)

    def _pmpo_receive(self, manifest: dict[str, Any], fingerprints: dict[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors: views of a bucket, whose memory is given back when all of them are used, or of pieces put together."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        loading = [get_layerwise_info(module) for module in self.model_runner.model.modules()]
        first = self._pmpo_join(manifest["channel"])
        entries, turns = self.pmpo_turns
        assembly = Assembly(entries)
        for turn in turns:
            start = first % len(turn)  # not all workers read from the same GPU at once
            for lane, bucket in turn[start:] + turn[:start]:
                began = time.monotonic()
                memory = self.pmpo_lanes[lane].receive(bucket_bytes(bucket))
                self.pmpo_waited_s += time.monotonic() - began
                for piece, rows in pieces_in(bucket, memory):
                    fingerprints[title(piece)] = fingerprint(rows, manifest["verify"])
                    for name, tensor in assembly.add(piece, rows):
                        yield name, round_matrix(tensor, manifest["rounding"])
                keep_what_waits(loading, memory)
                self.pmpo_lanes[lane].taken()

    def _pmpo_join(self, channel: dict[str, Any]) -> int:
        """Joins the lanes that lead to this worker's node; `Receiver.begin` of the first."""
        described = {lane: each for lane, each in enumerate(channel["lanes"][os.environ.get(NODE, "0")]) if each is not None}
        if self.pmpo_channel != channel["name"]:
            for receiver in self.pmpo_lanes.values():
                receiver.close()
            lanes: dict[int, Receiver] = {}
            self.pmpo_lanes, self.pmpo_channel = lanes, channel["name"]
            for lane, each in described.items():
                lanes[lane] = Receiver(each, self.device)
        return [self.pmpo_lanes[lane].begin(each["update"]) for lane, each in described.items()][0]


def keep_what_waits(loading: list[Any], memory: torch.Tensor) -> None:
    """Copies what vLLM has been given in ``memory`` and not yet loaded, because the bucket's memory is used again.

    vLLM 0.32 (reload/layerwise.py) holds on to tensors until all of a module have come; of modules with padding, until the end.
    What it says of every module is ``loading``.
    """
    place = memory.untyped_storage().data_ptr()
    for call in (call for info in loading for _, call in info.loaded_weights):
        for name, value in call.arguments.items():
            if not isinstance(value, torch.Tensor) or value.is_meta:
                continue
            if value.untyped_storage().data_ptr() == place:
                call.arguments[name] = value.clone()


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
