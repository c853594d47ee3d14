"""Arithmetic that many rooms share."""

GIB = 1 << 30  # bytes


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple
