"""The backends without compiled code against the textbook formula, as ratios of time in one run.

    python docs/examples/textbook.py

The textbook formula is what one writes with the library's own functions; it subtracts the mean first,
as this package does, but computes mean and variance in the dtype of the data. `copy` is the time of a
copy of x. Below 1, this package is faster than the formula.
"""

import importlib.util
import time

import numpy as np

import batchnorm as bn

CASES = (
    ((64, 100), 1),
    ((256, 1024), 1),
    ((32, 64, 28, 28), 1),
    ((32, 28, 28, 64), -1),
    ((32, 2048, 7, 7), 1),
    ((32, 512, 28, 28), 1),
    ((32, 256, 56, 56), 1),
    ((32, 56, 56, 256), -1),
)
SECONDS = 1.0  # of all contestants of a case, at least


def textbook(x, gamma, beta, axis, torch):
    """Return y by the formula."""
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    shape = [1] * x.ndim
    shape[axis] = -1
    if torch:
        mean, var = x.mean(axes, keepdim=True), x.var(axes, keepdim=True, correction=0)
        rstd = (var + 1e-5).rsqrt()
    else:
        mean, var = x.mean(axis=axes, keepdims=True), x.var(axis=axes, keepdims=True)
        rstd = 1 / np.sqrt(var + 1e-5)
    return (x - mean) * (gamma.reshape(shape) * rstd) + beta.reshape(shape)


def medians(functions):
    """Return the median time of each function, run in turn; the first run of each is left out."""
    found = [[] for _ in functions]
    for function in functions:
        function()
    while sum(map(sum, found)) < SECONDS or len(found[0]) < 5:
        for function, times in zip(functions, found, strict=True):
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
    return [float(np.median(times)) for times in found]


def on(backend, function):
    """Return a function that runs on a backend."""

    def call():
        bn.set_kernels(backend)
        return function()

    return call


def table(name, convert, backends):
    """Print a table of ratios."""
    print(f"{name:24} {'MB':>6} {'formula':>10} {'copy':>6}", *(f"{b:>8}" for b in backends))
    for shape, axis in CASES:
        x = np.random.default_rng(0).normal(5, 2, shape).astype(np.float32)
        gamma, beta = np.ones(shape[axis], np.float32), np.zeros(shape[axis], np.float32)
        x, gamma, beta = map(convert, (x, gamma, beta))
        copy = (lambda x=x: x.clone()) if name == "PyTorch" else (lambda x=x: x.copy())
        arguments = x, gamma, beta
        functions = [lambda a=arguments, k=axis: textbook(*a, k, name == "PyTorch"), copy]
        functions += [on(b, lambda a=arguments, k=axis: bn.batch_norm(*a, axis=k)) for b in backends]
        formula, *others = medians(functions)
        size = np.prod(shape) * 4 / 1e6
        copied, *ours = (t / formula for t in others)
        print(
            f"{'×'.join(map(str, shape)):24} {size:6.1f} {formula * 1e3:7.2f} ms {copied:6.2f}",
            *(f"{ratio:8.2f}" for ratio in ours),
        )


if __name__ == "__main__":
    table("NumPy", lambda a: a, ("numpy", "generic"))
    if importlib.util.find_spec("torch") is not None:
        import torch

        table("PyTorch", torch.from_numpy, ("numpy", "generic"))
    bn.set_kernels(None)
