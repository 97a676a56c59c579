"""Both passes on four host devices of JAX: cut by XLA, in `shard_map`, in a group and in `pmap`."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import batchnorm as bn

CALL = 'custom_call_target="batchnorm.'
SHARDED, WHOLE = PartitionSpec("d"), PartitionSpec()


def step(x, gamma, beta, dy, group=None):
    y, pullback = jax.vjp(lambda *a: bn.batch_norm(*a, group=group)[0], x, gamma, beta)
    return y, *pullback(dy)


def right(x, gamma, beta, dy):
    y, stats = bn.batch_norm(x, gamma, beta)
    return y, *bn.batch_norm_backward(dy, x, stats, gamma)


def check(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=2e-6, atol=2e-6)


def calls(function, *given):
    return function.lower(*given).compile().as_text().count(CALL)


def main():
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((8, 3, 5)).astype(np.float32) + 2 for _ in range(2))
    gamma, beta = (rng.standard_normal(3).astype(np.float32) for _ in range(2))
    given = x, gamma, beta, dy
    parts = [right(x[i : i + 2], gamma, beta, dy[i : i + 2]) for i in range(0, 8, 2)]
    joined = [np.concatenate(v) for v in list(zip(*parts, strict=True))[:2]]
    summed = [sum(v) for v in list(zip(*parts, strict=True))[2:]]

    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            put = [jax.device_put(v, NamedSharding(mesh, SHARDED)) for v in (x, dy)]
            sharded = put[0], gamma, beta, put[1]
            compiled = jax.jit(step)
            check(compiled(*sharded), right(*given))
            assert calls(compiled, *sharded) == 0
        assert bn.kernels_for(put[0]).name == "jax", bn.kernels_for(put[0])
        assert "4 devices" in bn.kernels_for(put[0]).why

    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    where = {"mesh": mesh, "in_specs": (SHARDED, WHOLE, WHOLE, SHARDED)}
    for checked, vectors in ((True, WHOLE), (False, SHARDED)):
        last = {"out_specs": (SHARDED, SHARDED, vectors, vectors), "check_vma": checked}
        function = jax.shard_map(step, **where, **last)
        mapped = jax.jit(function)
        assert calls(mapped, *given) == 2
        for f in (mapped, function):
            found = [np.asarray(v) for v in f(*given)]
            if not checked:  # a row for each device
                found[2:] = [v.reshape(4, 3).sum(0) for v in found[2:]]
            check(found, [*joined, *summed])

    group = bn.distributed.jax("d")
    last = {"out_specs": (SHARDED, SHARDED, WHOLE, WHOLE)}
    mapped = jax.jit(jax.shard_map(lambda *a: step(*a, group=group), **where, **last))
    check(mapped(*given), right(*given))
    assert calls(mapped, *given) >= 1

    for_each = jax.pmap(step, in_axes=(0, None, None, 0))
    rows = x.reshape(4, 2, 3, 5), gamma, beta, dy.reshape(4, 2, 3, 5)
    assert calls(for_each, *rows) == 2
    found = [np.asarray(v) for v in for_each(*rows)]
    check([v.reshape(8, 3, 5) for v in found[:2]], joined)
    check([v.sum(0) for v in found[2:]], summed)


if __name__ == "__main__":
    main()
