"""Handlers of XLA under load, each of which must end and give the right numbers.

python tests/jax_faults.py {threads,fork,late}
"""

import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np

import batchnorm as bn

SHAPE = (4, 16, 48, 48)  # 590 KB: enough for several threads


def arrays(seed):
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal(SHAPE, dtype=np.float32) for _ in range(2))
    return x, rng.standard_normal(16, dtype=np.float32), dy


def expected(x, gamma, dy):
    x, dy = np.tanh(x), np.sin(dy)
    y, stats = bn.batch_norm(x, gamma)
    return y, *bn.batch_norm_backward(dy, x, stats, gamma)[:2]


def step(x, gamma, dy):
    x, dy = jnp.tanh(x), jnp.sin(dy)  # on threads of XLA, of which one then calls the handler
    y, pullback = jax.vjp(lambda *a: bn.batch_norm(*a)[0], x, gamma)
    return y, *pullback(dy)


def check(found, right):
    for a, b in zip(found, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def threads():
    """2,000 calls from 24 threads: of jitted functions, and of one over four devices."""
    cases = [arrays(i) for i in range(8)]
    right = [expected(*case) for case in cases]
    jitted = jax.jit(step)
    four = jax.pmap(step)
    parts = [np.stack(v) for v in zip(*cases[:4], strict=True)]

    def call(i):
        if i % 4:
            check(jitted(*cases[i % 8]), right[i % 8])
        else:
            found = [np.asarray(v) for v in four(*parts)]  # indexing them is a collective of XLA
            for k in range(4):
                check([v[k] for v in found], right[k])

    with ThreadPoolExecutor(24) as pool:
        for done in [pool.submit(call, i) for i in range(2000)]:
            done.result()


def fork():
    """The child of a process whose handlers have run: NumPy's arrays there, and a handler here."""
    case = arrays(0)
    right = expected(*case)
    jitted = jax.jit(step)
    check(jitted(*case), right)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: check(expected(*case), right))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of forks
        child.start()
    check(jitted(*case), right)
    child.join(60)
    assert child.exitcode == 0, f"the child ended with {child.exitcode}"


def late():
    """The interpreter ends while calls run."""
    case = arrays(0)
    jitted = jax.jit(step)
    jitted(*case)
    for _ in range(50):
        jitted(*(jnp.asarray(v) for v in case))  # and nobody waits


if __name__ == "__main__":
    {"threads": threads, "fork": fork, "late": late}[sys.argv[1]]()
    print("done")
