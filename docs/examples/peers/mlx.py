"""MLX: mlx.nn.BatchNorm, on its CPU backend."""

import numpy as np

PEERS = {"mlx": "MLX, mlx.nn.BatchNorm"}
KNOWN = {
    "mlx": {
        "The mean is one float32": "y_at_mean y_of_many_values dx dgamma",
        "Arithmetic in 16 bits": "y_of_float16",
        "Squares beyond the range of float32": "y_of_large_numbers",
        "An empty batch poisons the running mean": "empty_batch",
    },
}
"""What is wrong, and the checks that fail by it."""


def peer(name):
    import importlib.metadata

    import mlx.core as mx
    from mlx import nn

    mx.set_default_device(mx.cpu)

    def array(v):
        return v if isinstance(v, mx.array) else mx.array(v)

    def norm(x, gamma, beta, mean, var, training=True, momentum=0.1, eps=1e-5):
        layer = nn.BatchNorm(len(gamma), eps=eps, momentum=momentum)
        layer.weight, layer.bias = gamma, beta
        if mean is not None:
            layer.running_mean, layer.running_var = mean, var
        layer.train(training)
        y = layer(mx.moveaxis(x, 1, -1))  # MLX has channels last
        return mx.moveaxis(y, -1, 1), layer.running_mean, layer.running_var

    def function(*given, **settings):
        found = norm(*(v if v is None else array(v) for v in given), **settings)
        return tuple(np.array(v) for v in found)

    def y_of(x, gamma, beta, eps):
        return norm(x, gamma, beta, None, None, eps=eps)[0]

    def vjp(f, primals, cotangent):
        return mx.vjp(f, list(primals), [cotangent])[1]

    def backward(dy, *given, eps):
        found = vjp(lambda *given: y_of(*given, eps), map(array, given), array(dy))
        return tuple(np.array(v) for v in found)

    def double_backward(ddx, *given, eps):
        def along(dy, x, gamma):
            dx = vjp(lambda x: y_of(x, gamma, mx.zeros_like(gamma), eps), [x], dy)[0]
            return (array(ddx) * dx).sum()

        found = vjp(along, map(array, given), mx.array(1.0))
        return tuple(np.array(v) for v in found)

    return {
        "function": function,
        "backward": backward,
        "double_backward": double_backward,
        "features": ["training", "inference", "running", "start", "float16", "large"],
        "versions": {"mlx": importlib.metadata.version("mlx")},
    }
