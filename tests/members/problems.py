"""What the members of a group normalize together: batches of several steps, and each member's part."""

from typing import NamedTuple

import numpy as np

from batchnorm.testing import data

CHANNELS, STEPS = 5, 3


class Case(NamedTuple):
    """Batches that members of a group normalize together."""

    name: str
    sizes: tuple[int, ...]
    kind: str
    dtype: str
    mean: float

    def batch(self, step):
        """x, dy and weights of all members."""
        shape = (sum(self.sizes), CHANNELS, 3)
        x = data.batch(shape, self.dtype, mean=self.mean, seed=10 + step)
        dy = data.batch(shape, self.dtype, mean=0.5, seed=20 + step)
        return x, dy, None if self.kind == "plain" else data.weights(shape, self.kind, seed=30 + step)

    def part(self, step, rank):
        """The same of one member."""
        cuts = np.cumsum(self.sizes)[:-1]
        return [a if a is None else np.split(a, cuts)[rank] for a in self.batch(step)]

    def parameters(self):
        return data.parameters((CHANNELS,), self.dtype)


def cases(members, brief=False):
    """All cases, or (where each is compiled for seconds) those that differ in more than numbers."""
    even = (6,) * members
    uneven = tuple(2 + 3 * i for i in range(members))
    empty = tuple(0 if i == members // 2 else 7 for i in range(members)) if members > 1 else (9,)
    found = [
        Case(f"{name}-{kind}-{dtype}", sizes, kind, dtype, mean)
        for name, sizes in (("even", even), ("uneven", uneven), ("empty", empty))
        for kind, dtype, mean in (
            ("plain", "float32", 1e4),
            ("plain", "float64", 1e8),
            ("mask", "float32", 1e4),
            ("weights", "float32", 3.0),
        )
    ]
    if brief:
        wanted = (
            "even-plain-float32",
            "uneven-plain-float64",
            "uneven-mask-float32",
            "empty-plain-float32",
        )
        return [c for c in found if c.name in wanted]
    return found
