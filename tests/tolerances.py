"""How far apart two results may lie: stated in spacings of the compared numbers, so that it holds on every processor.

Vector instructions, the order of sums and fused multiplications differ between processors, and each may move a result to
the neighbouring number that its type can hold. A tolerance below that spacing asks for equal bits; one far above it hides
errors. A check therefore allows a few spacings, and what the computation itself justifies on top of them.
"""

from __future__ import annotations

import torch


def spacing(numbers: torch.Tensor) -> torch.Tensor:
    """Distance of each number from the next larger one of its type; that of float32 near 1 is 1.2e-7."""
    size = numbers.detach().abs()
    return torch.nextafter(size, torch.full_like(size, float("inf"))) - size


def excess(
    found: torch.Tensor,
    expected: torch.Tensor,
    *,
    spacings: float,
    relative: float = 0.0,
    of: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """The largest difference as a multiple of what is allowed: at most 1 where the two agree.

    Args:
        spacings: number of spacings of ``dtype`` that are allowed, at the magnitude of each pair of numbers.
        relative: allowed on top of it, as a share of the largest absolute value of ``of``.
        of: the quantity that the error is a share of, such as the change of a weight; ``expected`` if not given.
        dtype: what ``found`` was computed in.
    """
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not found.numel():
        return 0.0
    larger = torch.maximum(found.abs().to(dtype), expected.abs().to(dtype))
    whole = (expected if of is None else of).detach().abs().max().double()
    allowed = spacings * spacing(larger).double() + relative * whole
    return float(((found.double() - expected.double()).abs() / allowed).max())


def assert_near(found: torch.Tensor, expected: torch.Tensor, what: str = "numbers", **allowed) -> None:
    """Fails where `excess` is above 1; NaN is never near anything."""
    times = excess(found, expected, **allowed)
    assert times <= 1.0, f"{what}: off by {times:.3g} times what is allowed"
