"""Batch norm under `jax.jit`: the core, array code, a textbook's formula, and Flax's module."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import batchnorm as bn
from batchnorm.bench.cases import SHAPES

ARRAYS = {name: shape for name, shape in SHAPES.items() if name.startswith(("ResNet", "DenseNet"))}
AXES = (0, 2, 3)


def textbook(x: Any, gamma: Any, beta: Any) -> Any:
    mean = x.mean(AXES, keepdims=True)
    var = ((x - mean) ** 2).mean(AXES, keepdims=True)
    return gamma[:, None, None] * (x - mean) / jnp.sqrt(var + 1e-5) + beta[:, None, None]


def flax(x: Any, gamma: Any, beta: Any) -> Any:
    layer = nnx.BatchNorm(x.shape[1], axis=1, momentum=0.9, rngs=nnx.Rngs(0))
    layer.scale.set_value(gamma)
    layer.bias.set_value(beta)
    return layer(x)


def package(x: Any, gamma: Any, beta: Any) -> Any:
    return bn.batch_norm(x, gamma, beta)[0]


CONTESTANTS: dict[str, tuple[Callable[..., Any], str | None]] = {
    "core": (package, "native"),
    "array code": (package, "jax"),
    "textbook": (textbook, None),
    "flax.nnx": (flax, None),
}


def compiled(
    norm: Callable[..., Any], kernels: str | None, arrays: Any, both: bool
) -> Callable[[], Any]:
    """Compile a pass, or both: y, and the gradients along dy; return a call of it that waits."""

    def forward(x: Any, gamma: Any, beta: Any, dy: Any) -> Any:
        return norm(x, gamma, beta)

    def step(x: Any, gamma: Any, beta: Any, dy: Any) -> Any:
        y, pullback = jax.vjp(norm, x, gamma, beta)
        return y, pullback(dy)

    bn.set_kernels(kernels)
    program = jax.jit(step if both else forward).lower(*arrays).compile()
    bn.set_kernels(None)
    return lambda: jax.block_until_ready(program(*arrays))


def medians(calls: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each call, which take turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for i in range(repeats + 2):
        for call, mine in zip(calls, seconds, strict=True):
            begin = time.perf_counter()
            call()
            if i >= 2:
                mine.append(time.perf_counter() - begin)
    return [statistics.median(mine) for mine in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--small", action="store_true", help="one array of each size only")
    given = parser.parse_args()
    arrays = {n: ARRAYS[n] for n in list(ARRAYS)[:: 5 if given.small else 1]}
    for both in (False, True):
        print(f"{'forward and gradient' if both else 'forward'}, ms".ljust(36), "copy".rjust(8), end="")
        print(*(name.rjust(11) for name in CONTESTANTS))
        ratios: dict[str, list[float]] = {name: [] for name in list(CONTESTANTS)[1:]}
        for name, shape in arrays.items():
            rng = np.random.default_rng(0)
            x, dy = (jnp.asarray(rng.standard_normal(shape, dtype=np.float32)) for _ in range(2))
            all_arrays = x, jnp.ones(shape[1]), jnp.zeros(shape[1]), dy
            source, target = np.asarray(x), np.empty(shape, np.float32)
            calls: list[Any] = [lambda s=source, t=target: np.copyto(t, s)]
            calls += [compiled(*c, all_arrays, both) for c in CONTESTANTS.values()]
            copy, mine, *others = medians(calls, given.repeats)
            label = f"{name}, {'x'.join(map(str, shape))}"
            print(label.ljust(36), f"{copy * 1e3:8.2f}", *(f"{v * 1e3:11.2f}" for v in (mine, *others)))
            for contestant, v in zip(ratios, others, strict=True):
                ratios[contestant].append(v / mine)
        for contestant, found in ratios.items():
            mean = math.prod(found) ** (1 / len(found))
            print(f"{contestant}: {mean:.2f} times the core's time (least {min(found):.2f})")


if __name__ == "__main__":
    main()
