"""Quantities that many rooms share."""

GIB = 1 << 30  # bytes
ITEM_SIZE = {"float32": 4, "bfloat16": 2}  # bytes of an element, by what a configuration calls its type


def resolve_dtype(dtype: str, device: str) -> str:
    """The key of `ITEM_SIZE` that ``dtype`` stands for on ``device``, "cpu" or "cuda"; auto is bfloat16 on a GPU."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device == "cuda" else "float32"


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple
