"""Contestants of the benchmark: functions that prepare a pass and return the function to time.

A timed function returns the result as users of the library receive it, in a new output if the library
makes one. A contestant returns None for a pass that the library does not have.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

import batchnorm as bn
from batchnorm.bench.cases import Case

Array = Any
Timed = Callable[[], Any]
EPS = 1e-5


class Contestant(NamedTuple):
    """An implementation of batch norm."""

    prepare: Callable[[Case, str], Timed | None]
    needs: str
    """The module that the contestant requires."""
    ours: bool
    kernels: str | None = None
    """The backend of this package to use."""


def package(convert: Callable[[Array], Array]) -> Any:
    """Run this package on the arrays of some library."""

    def prepare(case: Case, which: str) -> Timed:
        x, dy, gamma, beta, mean, var = (convert(a) for a in case[:6])
        settings: dict[str, Any] = {"axis": case.axis, "eps": EPS}
        back = {}
        if case.z is not None:
            settings |= {"residual": convert(case.z), "activation": "relu"}
        if which == "forward":
            return lambda: bn.batch_norm(x, gamma, beta, **settings)
        if which == "inference":
            return lambda: bn.normalize(x, mean, var, gamma, beta, **settings)
        y, stats = bn.batch_norm(x, gamma, beta, **settings)
        if case.z is not None:
            back = {"residual": True, "y": y}
        return lambda: bn.batch_norm_backward(dy, x, stats, gamma, beta, **{**settings, **back})

    return prepare


def _apart(case: Case, which: str) -> Timed | None:
    """Run this package on NumPy arrays, and the addition and the ReLU after it in NumPy."""
    norm = package(lambda a: a)(case._replace(z=None), which)
    if case.z is None:
        return None
    z = case.z

    def forward() -> Array:
        y = norm()
        y = y[0] if which == "forward" else y
        np.add(y, z, out=y)
        return np.maximum(y, 0, out=y)

    if which != "backward":
        return forward
    x, dy, gamma, beta = case[:4]
    settings: dict[str, Any] = {"axis": case.axis, "eps": EPS}
    y, stats = bn.batch_norm(x, gamma, beta, residual=z, activation="relu", **settings)

    def backward() -> Any:
        g = np.multiply(dy, y > 0)
        return *bn.batch_norm_backward(g, x, stats, gamma, **settings), g

    return backward


def _on_torch(a: Array) -> Array:
    import torch

    return torch.from_numpy(a)


def _on_jax(case: Case, which: str) -> Timed:
    """Run this package on JAX arrays, compiled by XLA."""
    import jax
    import jax.numpy as jnp

    x, dy, gamma, beta, mean, var = (jnp.asarray(a) for a in case[:6])
    z = None if case.z is None else jnp.asarray(case.z)
    settings: dict[str, Any] = {"axis": case.axis, "eps": EPS}
    settings |= {} if z is None else {"activation": "relu"}
    wait: Callable[[Any], Any] = jax.block_until_ready
    if which == "forward":
        f = jax.jit(lambda x, g, b, z: bn.batch_norm(x, g, b, residual=z, **settings))
        return lambda: wait(f(x, gamma, beta, z))
    if which == "inference":
        f = jax.jit(lambda x, m, v, g, b, z: bn.normalize(x, m, v, g, b, residual=z, **settings))
        return lambda: wait(f(x, mean, var, gamma, beta, z))
    y, stats = bn.batch_norm(x, gamma, beta, residual=z, **settings)
    settings |= {} if z is None else {"residual": True}
    y = None if z is None else y
    f = jax.jit(lambda dy, x, s, g, y: bn.batch_norm_backward(dy, x, s, g, y=y, **settings))
    return lambda: wait(f(dy, x, stats, gamma, y))


def _torch_operators(case: Case, which: str) -> Timed:
    """Run PyTorch's own operators, in its memory formats."""
    import torch

    def tensor(a: Array) -> Array:
        t = torch.from_numpy(a)
        return t.permute(0, t.ndim - 1, *range(1, t.ndim - 1)) if case.last and t.ndim > 1 else t

    x, dy, gamma, beta, mean, var = (tensor(a) for a in case[:6])
    norm = torch.nn.functional.batch_norm
    z = None if case.z is None else tensor(case.z)

    def added(y: Array) -> Array:
        return y if z is None else y.add_(z).relu_()

    if which == "forward":
        return lambda: added(norm(x, None, None, gamma, beta, training=True, eps=EPS))
    if which == "inference":
        return lambda: added(norm(x, mean, var, gamma, beta, training=False, eps=EPS))
    y, m, rstd = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)
    y, operator = added(y), torch.ops.aten.native_batch_norm_backward
    relu = torch.ops.aten.threshold_backward

    def backward() -> Any:
        g = dy if z is None else relu(dy, y, 0)
        return operator(g, x, gamma, None, None, m, rstd, True, EPS, [True, True, True]), g

    return backward


def _tensorflow(case: Case, which: str) -> Timed | None:
    """Run TensorFlow's fused batch norm, which on a CPU requires channels last."""
    import tensorflow as tf

    if not case.last or case.x.ndim > 4 or case.z is not None:
        return None
    shape = (case.x.shape[0], *(case.x.shape[1:-1] or (1,)), case.x.shape[-1])
    shape = shape if len(shape) == 4 else (*shape[:-1], 1, shape[-1])
    x, dy = (tf.constant(a.reshape(shape)) for a in (case.x, case.dy))
    gamma, beta, mean, var = (tf.constant(a) for a in case[2:6])
    raw = tf.raw_ops
    none = tf.constant([], tf.float32)
    if which == "forward":
        return lambda: (
            raw.FusedBatchNormV3(
                x=x, scale=gamma, offset=beta, mean=none, variance=none, epsilon=EPS, is_training=True
            ).y.numpy
        )
    if which == "inference":
        return lambda: (
            raw.FusedBatchNormV3(
                x=x, scale=gamma, offset=beta, mean=mean, variance=var, epsilon=EPS, is_training=False
            ).y.numpy
        )
    made = raw.FusedBatchNormV3(
        x=x, scale=gamma, offset=beta, mean=none, variance=none, epsilon=EPS, is_training=True
    )
    return lambda: raw.FusedBatchNormGradV3(
        y_backprop=dy, x=x, scale=gamma, reserve_space_1=made.reserve_space_1,
        reserve_space_2=made.reserve_space_2, reserve_space_3=made.reserve_space_3,
        epsilon=EPS, is_training=True,
    ).x_backprop.numpy  # fmt: skip


def _textbook(case: Case, which: str) -> Timed | None:
    """Run the formula of textbooks in NumPy."""
    if which != "forward" or case.z is not None:
        return None
    x, axes = case.x, tuple(i for i in range(case.x.ndim) if i != case.axis % case.x.ndim)
    vectors = tuple(np.expand_dims(v, axes) for v in (case.gamma, case.beta))

    def formula() -> Array:
        mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        return vectors[0] * (x - mean) / np.sqrt(var + EPS) + vectors[1]

    return formula


_copiers: dict[int, ThreadPoolExecutor] = {}


def copy(case: Case, which: str) -> Timed:
    """Copy as many bytes as the pass reads and writes, on as many threads.

    The target has been written to before; a copy to new memory takes twice as long.
    """
    threads = bn.get_num_threads()
    pool = _copiers.setdefault(threads, ThreadPoolExecutor(threads))
    # A backward pass reads two arrays and writes one: three halves of a copy's bytes. With a residual
    # and a ReLU, it reads y and writes the residual's gradient too; a forward pass reads the residual.
    halves = {(False, False): 2, (True, False): 3, (False, True): 3, (True, True): 5}
    count = case.x.size * halves[which == "backward", case.z is not None] // 2
    source, target = np.ones(count, case.x.dtype), np.ones(count, case.x.dtype)
    if source.nbytes < 2**20:
        return lambda: np.copyto(target, source)
    if importlib.util.find_spec("torch") is not None:  # its threads take less time to begin
        torch: Any = importlib.import_module("torch")
        to, of = torch.from_numpy(target), torch.from_numpy(source)
        return lambda: to.copy_(of)
    cuts = [count * i // threads for i in range(threads + 1)]
    parts = [slice(a, b) for a, b in itertools.pairwise(cuts)]

    def run() -> None:
        for done in [pool.submit(np.copyto, target[part], source[part]) for part in parts]:
            done.result()

    return run


CONTESTANTS = {
    "batchnorm (native)": Contestant(package(lambda a: a), "batchnorm._core", True, "native"),
    "batchnorm, add, ReLU": Contestant(_apart, "batchnorm._core", True, "native"),
    "batchnorm (NumPy)": Contestant(package(lambda a: a), "numpy", True, "numpy"),
    "batchnorm on PyTorch": Contestant(package(_on_torch), "torch", True),
    "batchnorm on JAX": Contestant(_on_jax, "jax", True),
    "PyTorch": Contestant(_torch_operators, "torch", False),
    "TensorFlow": Contestant(_tensorflow, "tensorflow", False),
    "textbook NumPy": Contestant(_textbook, "numpy", False),
    "copy": Contestant(copy, "numpy", False),
}


def present() -> dict[str, Contestant]:
    """Return the installed contestants, set to as many threads as this package uses."""
    found = {n: c for n, c in CONTESTANTS.items() if importlib.util.find_spec(c.needs) is not None}
    threads = bn.get_num_threads()
    if "PyTorch" in found:
        import torch

        torch.set_num_threads(threads)
    if "TensorFlow" in found:
        import os

        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    return found
