"""This package, on the arrays of each library."""

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import batchnorm as bn
from batchnorm.testing.libraries import targets

DEVICES = {
    "numpy": ("numpy", "native"),
    "torch": ("torch", "cpu-native"),
    "jax": ("jax", "jit"),
    "jax-x64": ("jax", "jit-x64"),
    "dask": ("dask", "lazy"),
    "ndonnx": ("ndonnx", "static"),
    "array-api-strict": ("array_api_strict", "CPU_DEVICE"),
    "cupy": ("cupy", "cupy"),
}
PEERS = {f"batchnorm-{name}": f"This package on arrays of {name}" for name in DEVICES}
KNOWN = {
    "batchnorm-jax": {
        "Squares beyond the range of float32": "y_of_large_numbers",
    },
}
"""What is wrong, and the checks that fail by it."""


class Together:
    """A group of threads, each of which has a part of the batch."""

    def __init__(self, size):
        self.found, self.barrier = {}, threading.Barrier(size)

    def all_reduce(self, array):
        self.found[threading.get_ident()] = array
        self.barrier.wait(10)
        total = sum(self.found[key] for key in sorted(self.found))
        self.barrier.wait(10)
        return total


def norm(x, gamma, beta, mean, var, training, momentum, eps, where=None, axis=1, group=None):
    if not training:
        return bn.normalize(x, mean, var, gamma, beta, axis=axis, eps=eps), mean, var
    y, stats = bn.batch_norm(x, gamma, beta, axis=axis, eps=eps, where=where, group=group)
    return y, *bn.update_running(mean, var, stats, momentum=momentum)


def gradients(dy, x, gamma, beta, eps):
    return bn.batch_norm_backward(dy, x, bn.moments(x), gamma, eps=eps)


def second_derivatives(ddx, dy, x, gamma, eps):
    return bn.batch_norm_double_backward(ddx, None, None, dy, x, bn.moments(x), gamma, eps=eps)


def peer(name):
    library, device = DEVICES[name.removeprefix("batchnorm-")]
    target = next(t for t in targets(library) if t.device_name == device)
    why = target.missing()
    if why is not None:
        raise ImportError(why)

    def function(x, gamma, beta, mean, var, *, where=None, shards=1, **settings):
        if mean is None:
            mean, var = np.zeros(gamma.shape, gamma.dtype), np.ones(gamma.shape, gamma.dtype)
        given = (gamma, beta, mean, var)

        def part(x, where, group):
            def call(x, where, *given):
                return norm(x, *given, where=where, group=group, **settings)

            with target.active():
                return target.call(call, x, where, *given)

        if shards == 1:
            return part(x, where, None)
        group = Together(shards)
        parts = np.split(x, shards), [None] * shards if where is None else np.split(where, shards)
        with ThreadPoolExecutor(shards) as pool:
            found = list(pool.map(lambda x, where: part(x, where, group), *parts))
        return np.concatenate([y for y, _, _ in found]), *found[0][1:]

    def on_target(f):
        def call(*arrays, eps):
            with target.active():
                return target.call(lambda *arrays: f(*arrays, eps=eps), *arrays)

        return call

    features = ["training", "inference", "running", "start", "where", "axis", "mixed", "large"]
    eager = library in ("numpy", "torch", "cupy")
    features += ["float64", "float64_parameters"] if device != "jit" else []
    features += ["float16", "bfloat16"] if library in ("numpy", "torch", "jax", "cupy") else []
    features += ["shards"] if eager else []
    module = importlib.import_module(library)
    return {
        "function": function,
        "backward": on_target(gradients),
        "double_backward": on_target(second_derivatives),
        "set_threads": bn.set_num_threads if eager else None,
        "features": features,
        "versions": {"batchnorm": bn.__version__, library: module.__version__},
    }
