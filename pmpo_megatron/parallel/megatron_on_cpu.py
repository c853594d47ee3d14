"""Lets Megatron-Core (0.16.1 and 0.19.x) run on CPU with gloo. Inert where CUDA is available.

Megatron-Core asks for ``torch.cuda.current_device()``, CUDA random states and ``device="cuda"`` in about sixty places,
also where nothing else about the code needs a GPU. `install` gives the modules below ``megatron.core`` a proxy under the
*name* ``torch`` in which exactly these calls answer for the CPU. Everybody else's ``torch`` is untouched, with two
exceptions that cannot be scoped because they are methods of tensors: ``Tensor.cuda`` returns the tensor itself instead
of raising, and the type names of ``Tensor.type()`` also equal their CUDA spelling.

A ``TorchFunctionMode`` does not work instead: it is not active in autograd's backward threads, hooks and recomputation.

What needs it (0.16.1 file names; 0.19 has the same places and ``cuda.current_stream``):
    distributed/param_and_grad_buffer.py, distributed/distributed_data_parallel.py   buffers on current_device()
    optimizer/optimizer.py, optimizer/clip_grads.py          ``Tensor.type()`` compared with torch.cuda.FloatTensor
    pipeline_parallel/p2p_communication.py, schedules.py     receive buffers, torch.cuda.synchronize()
    tensor_parallel/random.py                                CUDA random states of dropout and recomputation
    tensor_parallel/layers.py, models/common/embeddings/*    parameters and frequencies on current_device()
    jit.py                                                   torch.compile of small fused functions: a compiler run on CPU
    transformer/moe/token_dispatcher.py                      split sizes, which reach the host only from a GPU
    tensor_parallel/mappings.py                              all_gather of uneven pieces, which gloo refuses

Delete this module when Megatron-Core accepts a device where it now asks CUDA for the current one.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

CPU = torch.device("cpu")
FACTORIES = "tensor zeros ones empty full arange rand randn zeros_like ones_like empty_like full_like as_tensor".split()
_installed = False


def install() -> bool:
    """Makes Megatron-Core usable on CPU; does nothing where CUDA is available. Idempotent; returns whether it is on."""
    global _installed
    if _installed or torch.cuda.is_available():
        return _installed
    sys.meta_path.insert(0, _MegatronFinder())
    for name, module in list(sys.modules.items()):
        if _is_megatron(name):
            _scope(module)
    for name, method in (("cuda", _the_tensor_itself), ("type", _type_with_both_names(torch.Tensor.type))):
        setattr(torch.Tensor, name, method)
    _installed = True
    return True


def _is_megatron(name: str) -> bool:
    return name == "megatron.core" or name.startswith("megatron.core.")


class _MegatronFinder(importlib.abc.MetaPathFinder):
    """Finds ``megatron.core.*`` as usual, and scopes each module right after it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not _is_megatron(name):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            setattr(spec.loader, "exec_module", _run_then_scope(spec.loader.exec_module))  # noqa: B010  on this loader alone
        return spec


def _run_then_scope(execute: Callable[[types.ModuleType], None]) -> Callable[[types.ModuleType], None]:
    def exec_module(module: types.ModuleType) -> None:
        with _no_compilation():  # jit_fuser decorates with torch.compile while its modules are imported
            execute(module)
        _scope(module)

    return exec_module


@contextlib.contextmanager
def _no_compilation() -> Iterator[None]:
    compile_function = torch.compile
    vars(torch)["compile"] = lambda function=None, **kwargs: function if function is not None else (lambda inner: inner)
    try:
        yield
    finally:
        vars(torch)["compile"] = compile_function


def _scope(module: types.ModuleType) -> None:
    """Gives one Megatron module the proxy, and its random-state helpers the CPU generator."""
    if module.__dict__.get("torch") is torch:
        module.__dict__["torch"] = _TORCH
    if module.__name__ == "megatron.core.transformer.moe.token_dispatcher":
        module.__dict__["maybe_move_tensor_to_cpu"] = _as_numbers
    if module.__name__ == "megatron.core.tensor_parallel.random":
        module.__dict__.update(
            _lazy_call=lambda function, **kwargs: function(),
            _lazy_init=lambda: None,
            device_ctx_manager=lambda *args: contextlib.nullcontext(),
            _get_cuda_rng_state=_get_rng_state,
            _set_cuda_rng_state=_set_rng_state,
        )


class _Proxy(types.ModuleType):
    """A module with some names replaced; every other name is the real module's at the moment of use."""

    def __init__(self, real: types.ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(replaced, _real=real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


class _NoStream:
    """Stands for CUDA streams and events: everything on the CPU happens in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., _NoStream]:
        return lambda *args, **kwargs: self

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *error: Any) -> None:
        """Nothing was begun."""

    def elapsed_time(self, *args: Any) -> float:
        return 0.0

    def query(self) -> bool:
        return True


class _DeviceMeta(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, torch.device)

    def __call__(cls, *args: Any, **kwargs: Any) -> torch.device:
        return CPU if args and _on_cpu(args[0]) is CPU else torch.device(*args, **kwargs)


class _Device(metaclass=_DeviceMeta):
    """``torch.device`` whose ``cuda`` is the CPU; ``isinstance`` works as with the real one."""


class _TypeName(str):
    """``torch.FloatTensor`` that also equals ``torch.cuda.FloatTensor``."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or str.__eq__("torch.cuda." + self.removeprefix("torch."), other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _the_tensor_itself(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def _type_with_both_names(original: Callable[..., Any]) -> Callable[..., Any]:
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return _TypeName(result) if isinstance(result, str) else result

    return type_


def _on_cpu(device: Any) -> Any:
    """``device``, or the CPU where it means a GPU."""
    if type(device) is int or (isinstance(device, str) and device.startswith("cuda")):
        return CPU
    return CPU if isinstance(device, torch.device) and device.type == "cuda" else device


def _factory_on_cpu(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    factory.__name__ = function.__name__
    return factory


def _as_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What Megatron's ``maybe_move_tensor_to_cpu`` makes of a tensor on a GPU; its own leaves one on the CPU a tensor."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _all_gather(pieces: list[torch.Tensor], mine: torch.Tensor, group: Any = None, **options: Any) -> Any:
    """torch's ``all_gather``, also of pieces with unequal numbers of rows: experts get unequally many tokens."""
    sizes = [len(piece) for piece in pieces]
    if len(set(sizes)) == 1:
        return torch.distributed.all_gather(pieces, mine, group=group, **options)
    whole, copies = mine.new_empty(sum(sizes), *mine.shape[1:]), torch.cat([mine] * len(pieces))
    torch.distributed.all_to_all_single(whole, copies, sizes, [len(mine)] * len(pieces), group=group)
    for piece, received in zip(pieces, torch.split(whole, sizes), strict=True):
        piece.copy_(received)
    return None


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


_CUDA = _Proxy(
    torch.cuda,
    {
        "current_device": lambda: CPU,
        "device_count": lambda: 1,
        "set_device": _nothing,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "is_available": lambda: False,
        "is_current_stream_capturing": lambda: False,
        "Stream": _NoStream,
        "Event": _NoStream,
        "current_stream": lambda *args: _NoStream(),
        "default_stream": lambda *args: _NoStream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
        "default_generators": [torch.default_generator],
        "memory_allocated": _zero,
        "max_memory_allocated": _zero,
        "random": types.SimpleNamespace(get_rng_state=_get_rng_state, set_rng_state=_set_rng_state),
        "nvtx": types.SimpleNamespace(range_push=_nothing, range_pop=_nothing, mark=_nothing),
    },
)
_DISTRIBUTED = _Proxy(torch.distributed, {"all_gather": _all_gather})
_TORCH = _Proxy(
    torch,
    {name: _factory_on_cpu(getattr(torch, name)) for name in FACTORIES}
    | {"cuda": _CUDA, "device": _Device, "distributed": _DISTRIBUTED},
)
