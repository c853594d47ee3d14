"""Transformer Engine without its compiled part, which needs a GPU's toolkit to be made: its modules can be built, not run.

Importing this makes ``transformer_engine.pytorch`` importable. ``transformer_engine_torch`` is a module whose every name is a
class that refuses to be called, with integers for members, and whose enumerations have the members that Transformer Engine
2.20 checks for (pytorch/constants.py, pytorch/cpp_extensions/fused_attn.py). Its core library is not loaded.
"""

import enum
import os
import sys
import types
import warnings

import torch


class _Refusing(type):
    """A name of the compiled module, whatever it is there."""

    def __getattr__(cls, member: str) -> int:
        if member.startswith("__"):
            raise AttributeError(member)
        value = len([name for name in vars(cls) if not name.startswith("__")])
        setattr(cls, member, value)
        return value

    def __call__(cls, *arguments, **keywords):
        raise RuntimeError(f"transformer_engine_torch.{cls.__name__} is compiled, and not here")


class _CompiledModule(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Refusing(name, (), {})
        setattr(self, name, made)
        return made


def _enumeration(name: str, members: str) -> type[enum.IntEnum]:
    return enum.IntEnum(name, members, start=0)


def _install() -> None:
    compiled = _CompiledModule("transformer_engine_torch")
    numbers = "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1"
    compiled.DType = _enumeration("DType", numbers)
    backends = "NVTE_No_Backend NVTE_F16_arbitrary_seqlen NVTE_FP8"
    compiled.NVTE_Fused_Attn_Backend = _enumeration("NVTE_Fused_Attn_Backend", backends)
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # the core library is not loaded
    with warnings.catch_warnings(action="ignore"):  # it tries its PyTorch part at once, and does not find the compiled one
        import transformer_engine.common
    sys.modules[compiled.__name__] = compiled
    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch
    from transformer_engine.pytorch.module import base

    base.torch = _Apart(torch, cuda=_Apart(torch.cuda, is_available=lambda: True))  # what its modules ask when they are built


class _Apart:
    """A module with some names replaced for one of those that use it."""

    def __init__(self, real: types.ModuleType, **replaced) -> None:
        self._real = real
        vars(self).update(replaced)

    def __getattr__(self, name: str):
        return getattr(self._real, name)


_install()
