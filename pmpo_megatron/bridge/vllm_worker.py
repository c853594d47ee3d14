"""The receiving end: methods that every vLLM worker gets (``worker_extension_cls``), tensor-parallel or not.

One call does a whole update - check, load, finish - so no token is ever sampled between its parts. vLLM's own start,
update and finish calls leave the engine free to run in between, which kills it (vLLM 0.32).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from pmpo_megatron.bridge.fingerprint import fingerprint


class WeightReceiver:
    """Mixed into vLLM's worker: ``self.model_runner``, ``self.model_config`` and ``self.rank`` are the worker's."""

    def pmpo_describe(self) -> dict[str, Any]:
        """What the other side has to know before it relies on this worker."""
        return {
            "rank": self.rank,
            "version": getattr(self, "pmpo_version", 0),
            "logprobs_mode": self.model_config.logprobs_mode,
        }

    def pmpo_receive_weights(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Loads the tensors of ``manifest`` into the model; returns rank and fingerprints, or what is wrong.

        Nothing is touched unless names, shapes and count are those of the whole model. After a failure in the middle
        the model holds a mixture, and ``touched`` says so.
        """
        problem = check_manifest(manifest)
        if problem:
            return {"rank": self.rank, "problem": problem, "touched": False, "fingerprints": {}}
        found: dict[str, int] = {}
        self.pmpo_version = -1
        try:
            self._reload(manifest, found)
            self.pmpo_version = manifest["version"]
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        return {"rank": self.rank, "problem": problem, "touched": True, "fingerprints": found}

    def _reload(self, manifest: dict[str, Any], found: dict[str, int]) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        model = self.model_runner.model
        initialize_layerwise_reload(model)
        try:
            model.load_weights(_noting(received_tensors(manifest, self._mapped), found, manifest["verify"]))
        finally:
            finalize_layerwise_reload(model, self.model_config)
        _pack_output_layer(model)

    def _mapped(self, path: str, size: int) -> torch.Tensor:
        """The file's bytes. Mapped once: mapping anew costs a page fault for every 4 KiB, more than reading them."""
        known = getattr(self, "pmpo_mapping", None)
        if known is None or known[0] != (path, size):
            self.pmpo_mapping = ((path, size), torch.from_file(path, shared=True, size=size, dtype=torch.uint8))
        return self.pmpo_mapping[1]


def check_manifest(manifest: dict[str, Any]) -> str | None:
    """What is missing, extra or misshapen in ``manifest``, against the model's own list of tensors."""
    expected = {name: tuple(shape) for name, shape in manifest["expected"].items()}
    given = {tensor["name"]: tuple(tensor["shape"]) for tensor in manifest["tensors"]}
    if missing := sorted(expected.keys() - given.keys()):
        return f"missing: {', '.join(missing[:4])}"
    if extra := sorted(given.keys() - expected.keys()):
        return f"not in the model: {', '.join(extra[:4])}"
    if len(manifest["tensors"]) != len(given):
        return "a tensor comes twice"
    for name, shape in given.items():
        if shape != expected[name]:
            return f"{name}: shape {shape} instead of {expected[name]}"
    return None


def received_tensors(
    manifest: dict[str, Any], mapped: Callable[[str, int], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of everything in ``manifest``, mapped from its file, not copied."""
    if manifest["transport"] == "disk":
        from safetensors import safe_open

        for path in manifest["files"]:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
        return
    buffer = mapped(manifest["path"], manifest["bytes"])
    for tensor in manifest["tensors"]:
        dtype = getattr(torch, tensor["dtype"])
        size = torch.Size(tensor["shape"]).numel() * dtype.itemsize
        yield tensor["name"], buffer[tensor["offset"] : tensor["offset"] + size].view(dtype).view(tensor["shape"])


def _noting(
    tensors: Iterator[tuple[str, torch.Tensor]], found: dict[str, int], mode: str
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        found[name] = fingerprint(tensor, mode)
        yield name, tensor


def _pack_output_layer(model: torch.nn.Module) -> None:
    """vLLM 0.32 on CPU: an output layer tied to the embedding keeps the packed copy of its first weights after a reload.

    To be deleted when ``finalize_layerwise_reload`` packs tied ``ParallelLMHead`` modules again.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and next(module.parameters()).device.type == "cpu":
            module.quant_method.process_weights_after_loading(module)
