"""Axes of arrays in memory, merged to as few as strides allow."""

from __future__ import annotations

Axis = tuple[int, tuple[int, ...]]  # a length, and the stride of each array


def merge(axes: list[Axis]) -> list[Axis]:
    """Merge neighbouring axes that one stride leads through; drop axes of length 1."""
    found: list[Axis] = []
    for n, steps in axes:
        if n == 1:
            continue
        if found and all(a == n * b for a, b in zip(found[-1][1], steps, strict=True)):
            found[-1] = (found[-1][0] * n, steps)
        else:
            found.append((n, steps))
    return found
