"""Equinox: eqx.nn.BatchNorm under jax.vmap, in each of its modes."""

from functools import partial

import numpy as np

from batchnorm.audit.of_jax import derivatives

PEERS = {
    "equinox-batch": 'Equinox, eqx.nn.BatchNorm(mode="batch")',
    "equinox-ema": 'Equinox, eqx.nn.BatchNorm(mode="ema")',
}
ALL = {
    "An empty batch poisons the running mean": "empty_batch",
}
KNOWN = {
    "equinox-batch": {
        **ALL,
        "The mean is one float32": "y_at_mean y_of_many_values dx dgamma sharded_y",
        "Arithmetic in 16 bits": "y_of_float16 y_of_bfloat16",
        "Squares beyond the range of float32": "y_of_large_numbers",
        "An average that starts at 1 is corrected as if it started at 0": "first_batch",
    },
    "equinox-ema": {
        **ALL,
        "Training normalizes by the running average": (
            "y_at_mean y_of_many_values y_of_float16 y_of_bfloat16 y_of_large_numbers "
            "eps_inside_of_the_root variance_of_the_population statistics_of_each_channel "
            "constant_channel_is_beta nan_stays_in_its_channel dx dgamma sharded_y"
        ),
        "Inference of a new layer is not the identity": "start_of_running_statistics",
    },
}
"""What is wrong, and the checks that fail by it."""


def peer(name):
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    def layer_of(gamma, beta, mean, var, momentum, eps, names):
        layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            len(gamma),
            axis_name=names,
            eps=eps,
            momentum=1 - momentum,  # Equinox's is the weight of the old value
            mode=name.removeprefix("equinox-"),
            dtype=gamma.dtype,
        )
        layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (gamma, beta))
        if mean is not None and layer.mode == "ema":
            state = state.set(layer.ema_state_index, (mean, var))
            state = state.set(layer.ema_first_time_index, jnp.asarray(False))
        elif mean is not None:  # averages of so many batches that they need no correction
            state = state.set(layer.batch_state_index, (mean, var))
            state = state.set(layer.batch_counter, jnp.asarray(10**6))
        return layer, state

    def averages(layer, state):
        """Return the running statistics as inference uses them."""
        if layer.mode == "ema":
            return state.get(layer.ema_state_index)
        count, (mean, var) = state.get(layer.batch_counter), state.get(layer.batch_state_index)
        scale = jnp.where(count == 0, 1, 1 - layer.momentum**count)
        return mean / scale, var / scale

    def norm(x, gamma, beta, mean, var, training=True, momentum=0.1, eps=1e-5, shards=1):
        names = "batch" if shards == 1 else ("parts", "batch")
        layer, state = layer_of(gamma, beta, mean, var, momentum, eps, names)
        call = partial(layer, inference=not training)
        for axis_name in ("batch", "parts")[: 1 if shards == 1 else 2]:
            call = jax.vmap(call, in_axes=(0, None), out_axes=(0, None), axis_name=axis_name)
        split = x if shards == 1 else x.reshape(shards, -1, *x.shape[1:])
        y, state = call(split, state)
        return y.reshape(x.shape), *averages(layer, state)

    compiled = jax.jit(norm, static_argnames=("training", "momentum", "eps", "shards"))

    def function(x, gamma, beta, mean, var, **given):
        arrays = [None if v is None else jnp.asarray(v) for v in (x, gamma, beta, mean, var)]
        return tuple(map(np.asarray, compiled(*arrays, **given)))

    def y(x, gamma, beta, eps):
        return norm(x, gamma, beta, None, None, eps=eps)[0]

    return {
        "function": function,
        **derivatives(y),
        "correction": 0,
        "features": [
            *("training", "inference", "running", "start", "shards"),
            *("float16", "bfloat16", "large"),
        ],
        "versions": {"equinox": eqx.__version__, "jax": jax.__version__},
    }
