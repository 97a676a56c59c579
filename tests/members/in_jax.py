"""All members of a group as devices of one JAX program.

python -m members.in_jax size folder

One program runs on all devices, so all parts have one shape: the part of a member with less data is
padded with elements of zero weight.
"""

import os
import pickle
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ.pop("BATCHNORM_KERNELS", None)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

import batchnorm as bn
from members.problems import CHANNELS, STEPS, cases

GROUP = bn.distributed.jax("members")


def filled(case, step):
    """The members' parts, padded to one shape with NaN, and weights that say so."""
    most = max(case.sizes)
    parts = [case.part(step, rank) for rank in range(len(case.sizes))]

    def pad(a, value):
        return np.concatenate([a, np.full((most - len(a), *a.shape[1:]), value, a.dtype)])

    x = np.stack([pad(x, np.nan) for x, _, _ in parts])
    dy = np.stack([pad(dy, 0) for _, dy, _ in parts])
    if case.kind == "plain" and len(set(case.sizes)) == 1:
        return x, dy, None
    where = [np.ones(x.shape, bool) if w is None else w for x, _, w in parts]
    return x, dy, np.stack([pad(w, 0) for w in where])


def cut(case, padded):
    """The rows of each member that are no padding."""
    return [np.asarray(a)[:size] for a, size in zip(padded, case.sizes, strict=True)]


def over_devices(function, size):
    """A function of one member's part as one of all members', with shard_map and with pmap."""
    mesh = Mesh(np.array(jax.devices()[:size]), ("members",))
    spec = PartitionSpec("members")

    def member(*parts):  # a part comes with the axis of members, of length 1
        return jax.tree.map(lambda v: v[None], function(*(p[0] for p in parts)))

    sharded = jax.shard_map(member, mesh=mesh, in_specs=spec, out_specs=spec)
    return jax.jit(sharded), jax.pmap(function, "members", devices=jax.devices()[:size])


def solve(case):
    gamma, beta = map(jnp.asarray, case.parameters())
    size = len(case.sizes)

    def forward(x, where=None):
        return bn.batch_norm(x, gamma, beta, where=where, group=GROUP)

    def passes(x, dy, where=None):
        y, stats = forward(x, where)
        return y, stats, bn.batch_norm_backward(dy, x, stats, gamma, where=where, group=GROUP)

    def gradient(x, dy, where=None):
        return jax.grad(lambda x: jnp.sum(forward(x, where)[0] * dy))(x)

    sharded, mapped = over_devices(passes, size)
    found = [[] for _ in range(size)]
    running = (jnp.zeros(CHANNELS), jnp.ones(CHANNELS))
    for step in range(STEPS):
        given = [a for a in filled(case, step) if a is not None]
        y, stats, (dx, dgamma, dbeta) = sharded(*given)
        if step == 0:
            reductions = str(jax.make_jaxpr(sharded)(*given)).count("psum")
        if step == 0 and case.name.startswith("uneven"):  # each is compiled anew, for seconds
            for a, b in zip(
                jax.tree.leaves(mapped(*given)), [y, *stats, dx, dgamma, dbeta], strict=True
            ):
                np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
            given[0] = np.nan_to_num(given[0])
            scale = np.abs(given[1]).max() * np.abs(np.asarray(gamma)).max()
            for run in over_devices(gradient, size):
                for a, b in zip(cut(case, run(*given)), cut(case, dx), strict=True):
                    np.testing.assert_allclose(a, b, atol=64 * np.finfo(case.dtype).eps * scale)
        y, dx = cut(case, y), cut(case, dx)
        for rank in range(size):
            own = [np.asarray(v)[rank] for v in (*stats, dgamma, dbeta)]
            found[rank].append([y[rank], *own[:4], dx[rank], *own[4:], 1, reductions - 1])
        running = bn.update_running(*running, bn.Moments(*(v[0] for v in stats)))
    return [(f, [np.asarray(v) for v in running]) for f in found]


def main(size, folder):
    jax.config.update("jax_enable_x64", True)
    found = [{} for _ in range(int(size))]
    for case in cases(int(size), brief=True):
        for member, own in zip(found, solve(case), strict=True):
            member[case.name] = own
    Path(folder, "0.pickle").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
