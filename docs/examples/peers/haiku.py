"""Haiku: hk.BatchNorm."""

from functools import partial

import numpy as np

from batchnorm.audit.of_jax import derivatives

PEERS = {"haiku": "Haiku, hk.BatchNorm"}
KNOWN = {
    "haiku": {
        "The variance is E[x²] − E[x]²": (
            "y_at_mean y_of_many_values y_with_channels_last dx dgamma dx_of_a_constant_channel "
            "running_variance sharded_y"
        ),
        "Arithmetic in 16 bits": "y_of_float16 y_of_bfloat16",
        "Squares beyond the range of float32": "y_of_large_numbers",
        "An empty batch poisons the running mean": "empty_batch",
        "Inference of a new layer is not the identity": "start_of_running_statistics",
    },
}
"""What is wrong, and the checks that fail by it."""


def peer(name):
    import haiku as hk
    import jax
    import jax.numpy as jnp

    def layer_of(momentum, eps, axis=1, axis_name=None):
        def call(x, training):
            kept = axis % x.ndim
            layer = hk.BatchNorm(
                create_scale=True,
                create_offset=True,
                decay_rate=1 - momentum,
                eps=eps,
                axis=[i for i in range(x.ndim) if i != kept],
                cross_replica_axis=axis_name,
            )
            return layer(x, training)

        return hk.without_apply_rng(hk.transform_with_state(call))

    def norm(x, gamma, beta, mean, var, training=True, momentum=0.1, eps=1e-5, axis=1, axis_name=None):
        shape = [1] * x.ndim
        shape[axis] = -1
        layer = layer_of(momentum, eps, axis, axis_name)
        params = {"batch_norm": {"scale": gamma.reshape(shape), "offset": beta.reshape(shape)}}
        averages = ("batch_norm/~/mean_ema", "batch_norm/~/var_ema")
        if mean is None:  # as a new layer has them
            _, state = layer_of(momentum, eps, axis).init(None, x, True)
        else:  # averages of so many batches that they need no correction of their start
            values = {"counter": jnp.asarray(10**6)}
            state = {
                key: values | dict.fromkeys(("hidden", "average"), v.reshape(shape))
                for key, v in zip(averages, (mean, var), strict=True)
            }
        y, state = layer.apply(params, state, x, training)
        return y, *(state[key]["average"].reshape(-1) for key in averages)

    @partial(jax.jit, static_argnames=("training", "momentum", "eps", "axis", "shards"))
    def compiled(x, gamma, beta, mean, var, shards=1, **given):
        if shards == 1:
            return norm(x, gamma, beta, mean, var, **given)

        def part(x):
            return norm(x, gamma, beta, mean, var, axis_name="parts", **given)

        y, mean, var = jax.vmap(part, axis_name="parts")(x.reshape(shards, -1, *x.shape[1:]))
        return y.reshape(x.shape), mean[0], var[0]

    def function(x, gamma, beta, mean, var, **given):
        arrays = [None if v is None else jnp.asarray(v) for v in (x, gamma, beta, mean, var)]
        return tuple(map(np.asarray, compiled(*arrays, **given)))

    def y(x, gamma, beta, eps):
        return norm(x, gamma, beta, jnp.zeros_like(gamma), jnp.ones_like(gamma), eps=eps)[0]

    return {
        "function": function,
        **derivatives(y),
        "correction": 0,
        "features": [
            *("training", "inference", "running", "start", "shards", "axis"),
            *("float16", "bfloat16", "large"),
        ],
        "versions": {"dm-haiku": hk.__version__, "jax": jax.__version__},
    }
