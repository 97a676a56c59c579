"""Flax's batch norms: linen and nnx, with each of their two variances."""

from functools import partial

import numpy as np

from batchnorm.audit.of_jax import derivatives

PEERS = {
    "flax-linen": "Flax linen.BatchNorm",
    "flax-linen-slow-variance": "Flax linen.BatchNorm(use_fast_variance=False)",
    "flax-nnx": "Flax nnx.BatchNorm",
    "flax-nnx-slow-variance": "Flax nnx.BatchNorm(use_fast_variance=False)",
}
ALL = {
    "Squares beyond the range of float32": "y_of_large_numbers",
    "An empty batch poisons the running mean": "empty_batch",
    "A mask that leaves nothing poisons the running mean": "fully_masked",
    "A mask over several devices is averaged without its counts": (
        "sharded_masked_y sharded_masked_running_variance"
    ),
}
KNOWN = {
    "flax-linen": {
        **ALL,
        "The variance is E[x²] − E[x]²": (
            "y_at_mean y_of_many_values y_with_channels_last dx dgamma running_variance sharded_y"
        ),
    },
    "flax-linen-slow-variance": {
        **ALL,
        "The mean is one float32": (
            "y_at_mean y_of_many_values y_with_channels_last dx dgamma sharded_y"
        ),
    },
    "flax-nnx": {
        **ALL,
        "The variance is E[x²] − E[x]²": (
            "y_at_mean y_of_many_values y_with_channels_last dx dgamma running_variance sharded_y"
        ),
    },
    "flax-nnx-slow-variance": {
        **ALL,
        "The mean is one float32": (
            "y_at_mean y_of_many_values y_with_channels_last dx dgamma sharded_y"
        ),
    },
}
"""What is wrong, and the checks that fail by it."""


def peer(name):
    import flax
    import jax
    import jax.numpy as jnp
    from flax import linen, nnx

    def settings(x, training, momentum, eps, axis=1, axis_name=None):
        return {
            "use_running_average": not training,
            "axis": axis,
            "momentum": 1 - momentum,  # Flax's is the weight of the old value
            "epsilon": eps,
            "dtype": x.dtype,
            "use_fast_variance": "slow" not in name,
            "axis_name": axis_name,
        }

    def of_linen(x, gamma, beta, mean, var, where, **given):
        layer = linen.BatchNorm(**settings(x, **given))
        state = {"params": {"scale": gamma, "bias": beta}}
        if mean is not None:
            state["batch_stats"] = {"mean": mean, "var": var}
        else:
            state = layer.init(jax.random.key(0), x) | state
        y, new = layer.apply(state, x, mask=where, mutable=["batch_stats"])
        return y, new["batch_stats"]["mean"], new["batch_stats"]["var"]

    def of_nnx(x, gamma, beta, mean, var, where, **given):
        layer = nnx.BatchNorm(len(gamma), **settings(x, **given), rngs=nnx.Rngs(0))
        layer.scale[...], layer.bias[...] = gamma, beta
        if mean is not None:
            layer.mean[...], layer.var[...] = mean, var
        y = layer(x, mask=where)
        return y, layer.mean[...], layer.var[...]

    norm = of_linen if "linen" in name else of_nnx

    @partial(jax.jit, static_argnames=("training", "momentum", "eps", "axis", "shards"))
    def compiled(x, gamma, beta, mean, var, where, shards=1, **given):
        if shards == 1:
            return norm(x, gamma, beta, mean, var, where, **given)

        def part(x, where):
            return norm(x, gamma, beta, mean, var, where, axis_name="parts", **given)

        split = [None if v is None else v.reshape(shards, -1, *v.shape[1:]) for v in (x, where)]
        axes = (0, None if where is None else 0)
        y, mean, var = jax.vmap(part, axes, axis_name="parts")(*split)
        return y.reshape(x.shape), mean[0], var[0]

    def function(x, gamma, beta, mean, var, *, where=None, **given):
        given_arrays = [
            None if v is None else jnp.asarray(v) for v in (x, gamma, beta, mean, var, where)
        ]
        return tuple(map(np.asarray, compiled(*given_arrays, **given)))

    def y(x, gamma, beta, eps):
        mean, var = jnp.zeros_like(gamma), jnp.ones_like(gamma)
        return norm(x, gamma, beta, mean, var, None, training=True, momentum=0.1, eps=eps)[0]

    return {
        "function": function,
        **derivatives(y),
        "correction": 0,
        "features": [
            *("training", "inference", "running", "start", "where", "shards", "axis"),
            *("mixed", "float16", "bfloat16", "large"),
        ],
        "versions": {"flax": flax.__version__, "jax": jax.__version__},
    }
