"""One member of some that recalibrate together; what went wrong, or the statistics.

python -m members.recalibrating {mpi,gloo} {numpy,jax} case folder
"""

import os
import pickle
import sys
import time
from pathlib import Path

import numpy as np

import batchnorm as bn
from batchnorm.testing import data
from members.worker import group_of, leave

SIZES = (8, 5, 13, 4, 6)
TIMEOUT = 60


def batches():
    return [data.batch((n, 6), mean=3.0 + i, seed=i) for i, n in enumerate(SIZES)]


def run(group, kind, case):
    layers = [bn.BatchNorm(6), bn.BatchNorm(4)]
    weights = np.random.default_rng(5).standard_normal((6, 4)).astype(np.float32)
    if kind == "jax":
        import jax.numpy as jnp

        into = jnp.asarray
        weights = jnp.asarray(weights)
    else:
        into = np.asarray

    if case.startswith("joined"):
        layers[1].group = group
    seen = []

    def forward(x):
        if case == "raises" and group.rank == 1:
            raise RuntimeError("a batch that nobody can read")
        seen.append(x)
        if case == "joined, raises" and group.rank == 1 and len(seen) == 2:
            raise OSError("cannot read caf\udce9.npy")  # a name that is not UTF-8
        h = layers[0](x)
        return h if case == "never called" else layers[1](h @ weights)

    own = batches()[group.rank :: group.size]
    if case == "no batches" and group.rank == group.size - 1:
        own = []
    if case == "nothing":
        own = []
    if case == "joined, raises":
        own = batches()[:3]
    chosen = layers[:1] if case.startswith("joined") else layers
    if case == "another order" and group.rank == 1:
        chosen = layers[::-1]
    if case == "one layer less" and group.rank == 1:
        chosen = layers[:1]
    if case == "no layer" and group.rank == 1:
        chosen = 3
    start = time.monotonic()
    try:
        bn.recalibrate(chosen, forward, map(into, own), group=group, progress=False)
        error = ""
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    assert time.monotonic() - start < TIMEOUT / 2
    state = [np.asarray(v) for layer in layers for v in (layer.running_mean, layer.running_var)]
    count = [layer.num_batches_tracked for layer in layers]
    # And once more as it should be.
    _, stats = bn.batch_norm(data.batch((4, 3), seed=group.rank), group=group)
    return error, state, count, float(stats.count[0])


def main(engine, kind, case, folder):
    group = group_of(engine, folder, TIMEOUT)
    found = run(group, kind, case)
    Path(folder, f"{group.rank}.pickle").write_bytes(pickle.dumps(found))
    if engine == "gloo":
        leave()


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.argv:
        del os.environ["BATCHNORM_KERNELS"]  # NumPy's
    main(*sys.argv[1:])
