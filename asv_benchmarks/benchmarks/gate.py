"""The gate: what a change must not slow down, and what `history` measures over a series of commits.

Of the package only that is used which every commit has had since the first benchmarks.
"""

import functools

import numpy as np

import batchnorm as bn

from .copies import in_copies, in_processes

SHAPES = {
    "convolution": ((32, 64, 56, 56), 1),
    "channels last": ((32, 56, 56, 64), -1),
    "7 x 7": ((32, 512, 7, 7), 1),
    "vectors": ((256, 1024), 1),
}
PASSES = ("forward", "backward", "inference")
BACKENDS = {"compiled": ("native", "numba"), "numpy": ("numpy",)}
"""By their names at this commit and at older ones."""


def choose(backend):
    """Ask the package for a backend; an error where a commit has none of its names."""
    for name in BACKENDS[backend]:
        try:
            bn.set_kernels(name)
            bn.batch_norm(np.zeros((4, 3), np.float32))
        except (TypeError, ValueError, ImportError):  # an unknown name, or a backend that cannot run
            continue
        return
    bn.set_kernels(None)
    raise NotImplementedError(backend)  # asv skips the combination


def ready(shape, axis, which, fused=False):
    """Return a call of a pass, with its arrays made and its code loaded or compiled."""
    rng = np.random.default_rng(0)
    x, dy, z = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
    gamma, mean, var = (np.full(shape[axis], v, np.float32) for v in (1.5, 0.1, 1.1))
    settings = {"axis": axis} | ({"residual": z, "activation": "relu"} if fused else {})
    if which == "inference":
        return lambda: bn.normalize(x, mean, var, gamma, mean, **settings)
    if which == "forward":
        return lambda: bn.batch_norm(x, gamma, mean, **settings)
    y, stats = bn.batch_norm(x, gamma, mean, **settings)
    last = {"residual": True, "activation": "relu", "beta": mean, "y": y} if fused else {}
    return lambda: bn.batch_norm_backward(dy, x, stats, gamma, axis=axis, **last)


def moved(shape, which, fused):
    """The bytes of a copy that moves as many as a pass has to read and write."""
    arrays = 3 if which == "backward" else 2
    if fused:  # reads y and writes the residual's gradient too; a forward pass reads the residual
        arrays += 2 if which == "backward" else 1
    return 4 * int(np.prod(shape)) * arrays // 2


def copies(backend, shape, which, fused):
    """How many times as long as a copy a pass takes."""
    choose(backend)
    shape, axis = SHAPES[shape]
    prepare = functools.partial(ready, shape, axis, which, fused)
    return in_copies(prepare, moved(shape, which, fused))


class Gate:
    """Times of a copy that a pass takes, both measured in turns: the median of seven processes."""

    param_names = ("backend", "shape", "pass")
    params = (list(BACKENDS), list(SHAPES), list(PASSES))
    unit = "copies"
    timeout = 600
    version = "1"  # of the numbers: a change of this file that leaves them alone is no other benchmark
    processes = 7
    fused = False

    def setup(self, backend, shape, which):
        choose(backend)

    def track_copies(self, backend, shape, which):
        small, axis = tuple(min(n, 8) for n in SHAPES[shape][0]), SHAPES[shape][1]
        ready(small, axis, which, self.fused)()  # loads or compiles the code before the fork
        return in_processes(copies, (backend, shape, which, self.fused), self.processes)


class GateOfFused(Gate):
    """The same with a residual and a ReLU."""

    params = (list(BACKENDS), ["convolution"], list(PASSES))
    fused = True

    def setup(self, backend, shape, which):
        super().setup(backend, shape, which)
        try:
            bn.batch_norm(np.zeros((4, 3), np.float32), activation="relu")
        except TypeError:
            raise NotImplementedError from None
