"""Merge a million partial moments in trees of several random shapes, and see how the error grows.

The parts are exact binary fractions, so that Python's integers tell the mean and variance of all values
exactly. Errors are relative, in units of 2^-52.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

import batchnorm as bn

Array = Any
EPS = 2.0**-52
BITS = 30  # of the parts' means and variances, behind the point


def parts(count: int, mean: float, seed: int) -> tuple[Array, Array, Array]:
    """Counts from 1 to 1000, means around `mean`, and variances, as whole numbers of 2^-BITS."""
    rng = np.random.default_rng(seed)
    n = rng.integers(1, 1001, count)
    means = np.rint((rng.standard_normal(count) + mean) * 2**BITS).astype(np.int64)
    variances = rng.integers(0, 2**BITS, count)
    return n, means, variances


def exact(n: Array, means: Array, variances: Array) -> tuple[Fraction, Fraction]:
    """Mean and variance of all values."""
    total = int(n.sum())
    first = sum(a * b for a, b in zip(n.tolist(), means.tolist(), strict=True))
    second = sum(a * b * b for a, b in zip(n.tolist(), means.tolist(), strict=True))
    within = sum(a * b for a, b in zip(n.tolist(), variances.tolist(), strict=True))
    mean = Fraction(first, total * 2**BITS)
    square = Fraction(second, total * 4**BITS) + Fraction(within, total * 2**BITS)
    return mean, square - mean * mean


# Shapes: the parent of each node. Nodes below `count` are the parts; the root is its own parent.


def balanced(count: int, rng: Any) -> Array:
    """Neighbours in pairs, and so on."""
    parent = np.zeros(2 * count - 1, np.int64)
    level, free = np.arange(count), count
    while len(level) > 1:
        pairs = len(level) // 2
        new = np.arange(free, free + pairs)
        parent[level[: 2 * pairs]] = np.repeat(new, 2)
        level, free = np.concatenate([new, level[2 * pairs :]]), free + pairs
    parent[level[0]] = level[0]
    return parent


def split(count: int, rng: Any) -> Array:
    """A part that is drawn at random becomes two, until there are enough (Yule 1925)."""
    return _grown(count, rng, lambda k: (rng.random() * k, 0))


def uniform(count: int, rng: Any) -> Array:
    """Each binary tree with the same probability (Remy 1985): as deep as the root of the count."""
    return _grown(count, rng, lambda k: divmod(int(rng.random() * (2 * k - 1)), k)[::-1])


def _grown(count: int, rng: Any, drawn: Callable[[int], tuple[float, int]]) -> Array:
    """Put a new part beside a node that is drawn among k parts and the k - 1 nodes above them."""
    parent = list(range(2 * count - 1))
    root = 0
    for k in range(1, count):
        place, inner = drawn(k)
        node = int(place) + inner * count
        new = count + k - 1
        if node == root:
            root = parent[new] = new
        else:
            parent[new] = parent[node]
        parent[node] = parent[k] = new
    return np.array(parent)


def chains(count: int, rng: Any) -> Array:
    """Running totals: of a thousand parts each, and then of these."""
    length = max(2, round(count**0.5))
    parent = np.zeros(2 * count - 1, np.int64)
    free, ends = count, []

    def chain(nodes: list[int]) -> int:
        nonlocal free
        last = nodes[0]
        for node in nodes[1:]:
            parent[last] = parent[node] = free
            last, free = free, free + 1
        return last

    for start in range(0, count, length):
        ends.append(chain(list(range(start, min(start + length, count)))))
    root = chain(ends)
    parent[root] = root
    return parent


SHAPES = {"balanced": balanced, "split": split, "uniform": uniform, "chains": chains}


def merge(parent: Array, n: Array, mean: Array, var: Array) -> tuple[bn.Moments, int]:
    """Merge up a tree, all nodes at once whose parts are there; the result, and the tree's depth."""
    count, size = len(n), len(parent)
    fields = [np.zeros(size) for _ in range(4)]
    for field, v in zip(fields, (n, mean, var), strict=False):
        field[:count] = v
    waiting = np.full(size, -1)
    done, depth = np.arange(count), 0
    while len(done) > 1 or parent[done[0]] != done[0]:
        above = parent[done]
        order = np.argsort(above, kind="stable")
        above, below = above[order], done[order]
        both = above[1:] == above[:-1]  # two that are done at the same time
        left, right = below[:-1][both], below[1:][both]
        alone = ~(np.append(both, False) | np.append(False, both))
        one, node = below[alone], above[alone]
        ready = waiting[node] >= 0
        left = np.concatenate([left, waiting[node[ready]]])
        right = np.concatenate([right, one[ready]])
        waiting[node[~ready]] = one[~ready]
        done, depth = parent[left], depth + 1
        joined = bn.Moments.merge(*(bn.Moments(*(f[side] for f in fields)) for side in (left, right)))
        for field, v in zip(fields, joined, strict=True):
            field[done] = v
    return bn.Moments(*(field[done[0]] for field in fields)), depth


def errors(shape: str, count: int, mean: float = 1e3, seed: int = 0) -> tuple[float, float, int]:
    """Relative errors of mean and variance in units of 2^-52, and the depth of the tree."""
    rng = np.random.default_rng([seed, count])
    n, means, variances = parts(count, mean, seed)
    parent = SHAPES[shape](count, rng)
    order = rng.permutation(count)  # no part has a place of its own
    n, means, variances = n[order], means[order], variances[order]
    found, depth = merge(parent, n, means / 2.0**BITS, variances / 2.0**BITS)
    right = exact(n, means, variances)
    both = [Fraction(float(found.mean)) + Fraction(float(found.mean_lo)), Fraction(float(found.var))]
    off = [float(abs(a - b) / abs(b)) / EPS for a, b in zip(both, right, strict=True)]
    return off[0], off[1], depth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="of parts, at most")
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    print(f"worst of {chosen.seeds} seeds; mean 1000, std about 1.2; errors in units of 2^-52")
    print(f"{'shape':>9} {'parts':>9} {'depth':>6} {'mean':>8} {'variance':>9}")
    for shape in SHAPES:
        count = 1000
        while count <= chosen.count:
            worst = [
                max(v)
                for v in zip(*(errors(shape, count, seed=s) for s in range(chosen.seeds)), strict=True)
            ]
            print(f"{shape:>9} {count:>9} {worst[2]:>6} {worst[0]:>8.2g} {worst[1]:>9.2g}", flush=True)
            count *= 10


if __name__ == "__main__":
    main()
