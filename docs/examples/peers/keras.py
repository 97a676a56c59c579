"""Keras 3: keras.layers.BatchNormalization, on each of its backends."""

import os

import numpy as np

PEERS = {
    "keras-tensorflow": "Keras on TensorFlow",
    "keras-jax": "Keras on JAX",
    "keras-torch": "Keras on PyTorch",
}
ALL = {
    "Squares beyond the range of float32": "y_of_large_numbers",
    "An empty batch poisons the running mean": "empty_batch",
}
KNOWN = {
    "keras-tensorflow": {
        **ALL,
        "The mean is one float32": "y_at_mean y_of_many_values y_with_channels_last dx dgamma",
        "Gradients of parameters are sums in one row": "sums_of_many_gradients",
        "The second derivative lacks a term": "second_derivative",
        "Inference is x·scale + shift": "inference_by_running_statistics",
    },
    "keras-jax": {
        **ALL,
        "The mean is one float32": "y_at_mean y_of_many_values y_with_channels_last dx dgamma",
        "Inference is x·scale + shift": "inference_by_running_statistics",
    },
    "keras-torch": {
        **ALL,
        "The variance is E[x²] − E[x]²": (
            "y_at_mean y_of_many_values y_with_channels_last dx dgamma running_variance"
        ),
        "float64 is computed in float32": "y_of_float64 running_mean_of_float64",
    },
}
"""What is wrong, and the checks that fail by it."""


def of_jax(f, primals, cotangent):
    import jax

    return jax.vjp(f, *primals)[1](cotangent)


def of_tensorflow(f, primals, cotangent):
    import tensorflow as tf

    primals = list(primals)
    with tf.GradientTape() as tape:
        tape.watch(primals)
        y = f(*primals)
    return tape.gradient(y, primals, output_gradients=cotangent)


def of_torch(f, primals, cotangent):
    import torch

    primals = [v.requires_grad_() for v in primals]
    return torch.autograd.grad(f(*primals), primals, cotangent, create_graph=True)


VJP = {"jax": of_jax, "tensorflow": of_tensorflow, "torch": of_torch}


def peer(name):
    backend = name.removeprefix("keras-")
    os.environ["KERAS_BACKEND"] = backend
    framework = __import__(backend)
    import keras

    def layer_of(x, momentum=0.1, eps=1e-3, axis=1):
        dtype = keras.backend.standardize_dtype(x.dtype)
        layer = keras.layers.BatchNormalization(
            axis=axis,
            momentum=1 - momentum,  # Keras's is the weight of the old value
            epsilon=eps,
            dtype=f"mixed_{dtype}" if dtype.endswith("16") else dtype,
        )
        layer.build(tuple(x.shape))
        return layer

    def function(x, gamma, beta, mean, var, *, training, where=None, axis=1, **settings):
        if where is not None:  # a mask of Keras has no axis of channels, which are last
            x, where, axis = np.moveaxis(x, 1, -1), np.moveaxis(where, 1, -1)[..., 0], -1
        layer = layer_of(x, axis=axis, **settings)
        given = [gamma, beta, *layer.get_weights()[2:]] if mean is None else [gamma, beta, mean, var]
        layer.set_weights(given)
        y = layer(x, training=training, mask=where)
        y, mean, var = map(keras.ops.convert_to_numpy, (y, layer.moving_mean, layer.moving_variance))
        return y if where is None else np.moveaxis(y, -1, 1), mean, var

    def y(x, gamma, beta, eps):
        layer = layer_of(x, eps=eps)
        state = [v.value for v in layer.non_trainable_variables]
        return layer.stateless_call([gamma, beta], state, x, training=True)[0]

    vjp = VJP[backend]

    def backward(dy, x, gamma, beta, *, eps):
        given = map(keras.ops.convert_to_tensor, (x, gamma, beta))
        found = vjp(lambda *given: y(*given, eps), given, keras.ops.convert_to_tensor(dy))
        return tuple(map(keras.ops.convert_to_numpy, found))

    def double_backward(ddx, dy, x, gamma, *, eps):
        ddx, dy, x, gamma = map(keras.ops.convert_to_tensor, (ddx, dy, x, gamma))

        def along(dy, x, gamma):
            dx = vjp(lambda x: y(x, gamma, keras.ops.zeros_like(gamma), eps), [x], dy)[0]
            return keras.ops.sum(ddx * dx)

        found = vjp(along, (dy, x, gamma), keras.ops.ones((), ddx.dtype))
        return tuple(map(keras.ops.convert_to_numpy, found))

    return {
        "function": function,
        "backward": backward,
        "double_backward": double_backward,
        "correction": 0,
        "features": [
            *("training", "inference", "running", "start", "where", "axis"),
            *("mixed", "float16", "bfloat16", "large"),
            *(["float64", "float64_parameters"] if backend != "jax" else []),
        ],
        "versions": {"keras": keras.__version__, backend: framework.__version__},
    }
