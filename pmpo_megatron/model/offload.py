"""What leaves the GPU while rollouts run: gradients are freed, states and weights wait in pinned memory of the host.

Storages are emptied and filled again, so that every tensor and view of them stays what it is, with the same bits. So does
Megatron-Core with its buffers (0.16.1 and 0.19.2, distributed_data_parallel.py, `offload_grad_buffers`), which frees gradients.
Its `optimizer.offload_to_cpu` is not used: it copies through pageable memory, waits for every tensor, and takes the main
parameters of a float32 model, which are views of the weights, away from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pmpo_megatron.model.optimizer import parts_of

BLOCK = 2**28  # bytes; PyTorch rounds a pinned allocation up to a power of two


class HostCopies:
    """Storages of tensors on ``device``, empty while their bytes lie on the host. The host's memory is kept for next time."""

    def __init__(self, device: torch.device) -> None:
        self._blocks: list[torch.Tensor] = []
        self._places: dict[torch.UntypedStorage, tuple[int, int]] = {}  # first byte in the blocks, number of bytes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def move_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copies the storages of ``tensors``, which must be resizable, to the host, and frees them."""
        end = 0
        for storage in dict.fromkeys(tensor.untyped_storage() for tensor in tensors):
            self._places[storage] = end, storage.nbytes()
            end += storage.nbytes()
        while len(self._blocks) * BLOCK < end:
            self._blocks.append(torch.empty(BLOCK, dtype=torch.uint8, pin_memory=self._stream is not None))
        with self._side_stream():
            for storage, (begin, _) in self._places.items():
                for here, there in self._pieces(_bytes_of(storage), begin):
                    there.copy_(here, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        for storage in self._places:
            storage.resize_(0)

    def bring_back(self) -> None:
        """Begins to fill what was moved out; nothing may use it before `wait`."""
        for storage, (_, size) in self._places.items():
            storage.resize_(size)
        with self._side_stream():
            for storage, (begin, _) in self._places.items():
                for here, there in self._pieces(_bytes_of(storage), begin):
                    here.copy_(there, non_blocking=True)
        self._places = {}

    def wait(self) -> None:
        """What this stream does from now on comes after `bring_back`. The host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def on_device(self, tensor: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """``count`` rows of ``tensor``, contiguous, from row ``first``; a copy on its device where it was moved out."""
        place = self._places.get(tensor.untyped_storage())
        if place is None:
            return tensor[first : first + count]
        row = tensor.shape[1:]  # an emptied storage has no views but those that there were
        copy = torch.empty((count, *row), dtype=tensor.dtype, device=tensor.device)
        begin = place[0] + (int(tensor.storage_offset()) + first * row.numel()) * tensor.itemsize
        for here, there in self._pieces(copy.view(-1).view(torch.uint8), begin):
            here.copy_(there, non_blocking=True)
        return copy

    def _side_stream(self) -> AbstractContextManager[Any]:
        """A stream whose copies come after all that the present one was given, and hold nothing up."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def _pieces(self, here: torch.Tensor, begin: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """``here``, uint8, in pieces, each with its place on the host, where the first byte is number ``begin``."""
        done = 0
        while done < len(here):
            block, offset = divmod(begin + done, BLOCK)
            count = min(len(here) - done, BLOCK - offset)
            yield here[done : done + count], self._blocks[block][offset : offset + count]
            done += count


class PhaseMemory:
    """A policy's memory while rollouts run, and while it trains. With ``offload`` (`ModelConfig`) `none` only gradients go."""

    def __init__(self, chunks: Sequence[Any], optimizer: Any | None, offload: str, device: torch.device) -> None:
        self._chunks, self._optimizer, self._offload = chunks, optimizer, offload
        self._weights, self._states = HostCopies(device), HostCopies(device)

    def begin_rollouts(self) -> None:
        """From here on weights can be read (`weight`), and nothing else."""
        parameters = [parameter for chunk in self._chunks for parameter in chunk.parameters()]
        if self._optimizer is not None:
            if self._offload != "none":
                self._states.move_out(states_of(self._optimizer, parameters))
            for chunk in self._chunks:
                chunk.offload_grad_buffers()
        if self._offload == "all":
            self._weights.move_out(parameters)

    def begin_training(self) -> None:
        """Weights are back, gradients 0. The optimizer's states still come, while log-probs are scored: see `wait`."""
        self._weights.bring_back()
        self._weights.wait()
        if self._optimizer is not None:
            for chunk in self._chunks:
                chunk.restore_grad_buffers(synchronize=False)
            self._states.bring_back()

    def wait(self) -> None:
        """From here on everything is there."""
        self._states.wait()

    def weight(self, parameter: torch.Tensor, first: int = 0, count: int | None = None) -> torch.Tensor:
        """``count`` rows of ``parameter`` from row ``first``, or all, wherever they are."""
        return self._weights.on_device(parameter.detach(), first, len(parameter) if count is None else count)


def states_of(optimizer: Any, parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Megatron's main parameters and Adam's moments, but for what shares memory with the model's ``parameters``."""
    weights = {parameter.untyped_storage() for parameter in parameters}
    inner = [part.optimizer for part in parts_of(optimizer) if part.optimizer is not None]  # a rank may have none
    mains = [parameter for each in inner for group in each.param_groups for parameter in group["params"]]
    moments = [value for each in inner for state in each.state.values() for value in state.values()]
    tensors = [value for value in (*mains, *moments) if isinstance(value, torch.Tensor)]
    return [tensor for tensor in tensors if tensor.untyped_storage() not in weights]


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """uint8 [bytes], the same memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
