"""Calls of a group with faults at random members and places: all members go on, or none does.

python -m members.random_faults {mpi,gloo} steps seed folder
"""

import pickle
import sys
from pathlib import Path

import numpy as np

import batchnorm as bn
from batchnorm import groups
from batchnorm.backends.dispatch import backend_for
from batchnorm.testing import data
from members.faulty import out_of_memory
from members.worker import group_of, leave

# A fault is none, an argument that is refused, or something that fails in the middle of a call.
FAULTS = (None, None, None, "dtype", "channels", "eps", "moments", "grad_sums", "merge")
RIGHT_MERGE = groups.merge_vectors


def one_call(group, rng, step):
    """Forward and backward with one fault at most; what came of it here, and what is right."""
    which, at_fault = FAULTS[rng.integers(len(FAULTS))], rng.integers(group.size)
    groups.ONE_VECTOR = int(rng.choice([0, 2**19]))  # in two sums or in one
    channels = int(rng.integers(1, 7))
    sizes = rng.integers(0, 6, group.size)
    sizes[0] += 2
    parts = [data.batch((int(n), channels), mean=5.0, seed=[step, i]) for i, n in enumerate(sizes)]
    x, eps = parts[group.rank], 1e-5
    mine = which is not None and at_fault == group.rank
    if mine and which == "dtype":
        x = x.astype(np.float64)
    elif mine and which == "channels":
        x = data.batch((4, channels + 1))
    elif mine and which == "eps":
        eps = -1.0
    elif mine and which in ("moments", "grad_sums"):
        out_of_memory(which)
    elif mine and which == "merge":

        def no_merge(*arguments):
            raise MemoryError("no room to merge")

        groups.merge_vectors = no_merge
    try:
        y, stats = bn.batch_norm(x, group=group, eps=eps)
        _, dgamma, _ = bn.batch_norm_backward(np.ones_like(y) * y, x, stats, group=group)
        whole = np.concatenate(parts).astype(float)
        np.testing.assert_allclose(stats.mean, whole.mean(0), rtol=1e-12)
        np.testing.assert_allclose(stats.var, whole.var(0), rtol=1e-9)
        np.testing.assert_allclose(dgamma, len(whole) * whole.var(0) / (whole.var(0) + 1e-5), rtol=1e-3)
        found = "right"
    except (bn.distributed.GroupError, MemoryError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
    finally:
        bn.passes.backend_for, groups.merge_vectors = backend_for, RIGHT_MERGE
    return which, found


def main(engine, steps, seed, folder):
    group = group_of(engine, folder, 20)
    rng = np.random.default_rng(int(seed))  # the same on every member
    found = [one_call(group, rng, step) for step in range(int(steps))]
    Path(folder, f"{group.rank}.pickle").write_bytes(pickle.dumps(found))
    if engine == "gloo":
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
