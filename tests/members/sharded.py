"""Arrays of JAX that are spread over four devices, eager and compiled, against the oracle.

python -m members.sharded {auto,explicit}
"""

import contextlib
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ.pop("BATCHNORM_KERNELS", None)

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import batchnorm as bn
import batchnorm.flax
from batchnorm.testing import data, verdict
from batchnorm.testing.oracle import Problem

SHAPE = (8, 4, 5)


def forward(x, dy, gamma, beta):
    y, stats = bn.batch_norm(x, gamma, beta)
    return y, stats


def backward(x, dy, gamma, beta):
    return bn.batch_norm_backward(dy, x, bn.moments(x), gamma)


def gradient(x, dy, gamma, beta):
    return jax.grad(lambda *a: (bn.batch_norm(*a)[0] * dy).sum(), argnums=(0, 1, 2))(x, gamma, beta)


def masked(x, dy, gamma, beta):
    y, stats = bn.batch_norm(x, gamma, beta, where=jnp.abs(x) >= 0)
    return y, stats


def inference(x, dy, gamma, beta):
    return bn.normalize(x, gamma, gamma**2, gamma, beta)


def layer(x, dy, gamma, beta):
    made = bn.BatchNorm(4)
    made.load_state_dict({**bn.BatchNorm(4, xp=jnp).state_dict(), "gamma": gamma, "beta": beta})
    y = made(x)
    dx = made.backward(dy)
    return y, dx, made.running_mean, made.eval()(x)


def fresh_layer(x, dy, gamma, beta):
    made = bn.BatchNorm(4)
    return made(x), made.backward(dy)


def module(x, dy, gamma, beta):
    made = batchnorm.flax.BatchNorm(4, axis=1, rngs=nnx.Rngs(0), use_running_average=False)
    return made(x), made.mean[...], made(x, use_running_average=True)


FUNCTIONS = (forward, backward, gradient, masked, inference, layer, fresh_layer, module)


def judge(function, given, found):
    """Compare with the oracle; `found` in NumPy."""
    x, dy, gamma, beta = given
    plain, affine = Problem(x), Problem(x, gamma, beta)
    if function in (forward, masked):
        verdict.forward(found[0], affine, "float32")
        verdict.moments(found[1], affine)
    elif function in (backward, gradient):
        verdict.backward(found, affine.backward(dy), "float32", "float32")
    elif function is inference:
        verdict.forward(found, Problem(x, gamma, beta, mean=gamma, var=gamma**2), "float32")
    elif function is layer:
        verdict.forward(found[0], affine, "float32")
        grads = affine.backward(dy)
        verdict.assert_close(found[1], grads.dx, grads.dx_size, "float32", 16, "dx")
        np.testing.assert_allclose(found[2], 0.1 * x.astype(float).mean((0, 2)), rtol=1e-6)
    elif function is fresh_layer:
        verdict.forward(found[0], plain, "float32")
    else:
        verdict.forward(found[0], plain, "float32")
        np.testing.assert_allclose(found[1], 0.01 * x.astype(float).mean((0, 2)), rtol=1e-5)


def main(kind):
    explicit = kind == "explicit"
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit if explicit else AxisType.Auto,))
    x, dy = data.batch(SHAPE, mean=3.0), data.batch(SHAPE, mean=0.5, seed=5)
    gamma, beta = data.parameters((4,))
    for spec in (P("d"), P(None, "d"), P()):
        big = [jax.device_put(a, NamedSharding(mesh, spec)) for a in (x, dy)]
        with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
            given = (*big, jnp.asarray(gamma), jnp.asarray(beta))
            for function in FUNCTIONS:
                for compiled in (False, True):
                    found = (jax.jit(function) if compiled else function)(*given)
                    sharding = jax.tree.leaves(found)[0].sharding
                    assert len(sharding.device_set) == 4, f"{function.__name__}: {sharding}"
                    judge(function, (x, dy, gamma, beta), jax.tree.map(np.asarray, found))


if __name__ == "__main__":
    main(*sys.argv[1:])
