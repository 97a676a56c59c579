"""PaddlePaddle: paddle.nn.functional.batch_norm."""

import numpy as np

PEERS = {
    "paddle-channels-second": "PaddlePaddle, data_format=NCHW",
    "paddle-channels-last": "PaddlePaddle, data_format=NHWC",
}
ALL = {
    "The mean is one float32": "y_at_mean y_of_many_values dx dgamma",
    "Squares beyond the range of float32": "y_of_large_numbers",
    "Inference is x·scale + shift": "inference_by_running_statistics",
}
KNOWN = {
    "paddle-channels-second": {
        **ALL,
    },
    "paddle-channels-last": {
        **ALL,
        "Gradients of parameters are sums in one row": "sums_of_many_gradients",
    },
}
"""What is wrong, and the checks that fail by it."""


def peer(name):
    import paddle

    last = name == "paddle-channels-last"
    paddle.set_device("cpu")

    def norm(x, gamma, beta, mean, var, training, momentum, eps):
        form = {2: "NC", 3: "NLC" if last else "NCL", 4: "NHWC" if last else "NCHW"}[x.ndim]
        order = list(range(x.ndim))
        if last:
            x = x.transpose([*order[:1], *order[2:], 1])
        y = paddle.nn.functional.batch_norm(
            x,
            mean,
            var,
            gamma,
            beta,
            training=training,
            momentum=1 - momentum,  # Paddle's is the weight of the old value
            epsilon=eps,
            data_format=form,
        )
        return y.transpose([*order[:1], order[-1], *order[1:-1]]) if last else y

    def tensor(v, trained=False):
        return paddle.to_tensor(np.ascontiguousarray(v), stop_gradient=not trained)

    def function(x, gamma, beta, mean, var, *, training, momentum, eps):
        if mean is None:
            new = paddle.nn.BatchNorm1D(len(gamma))
            mean, var = new._mean.numpy(), new._variance.numpy()
        mean, var = tensor(mean), tensor(var)
        y = norm(tensor(x), tensor(gamma), tensor(beta), mean, var, training, momentum, eps)
        return y.numpy(), mean.numpy(), var.numpy()

    def y_of(x, gamma, beta, eps):
        mean, var = paddle.zeros(gamma.shape, gamma.dtype), paddle.ones(gamma.shape, gamma.dtype)
        return norm(x, gamma, beta, mean, var, True, 0.1, eps)

    def backward(dy, x, gamma, beta, *, eps):
        given = [tensor(v, trained=True) for v in (x, gamma, beta)]
        grads = paddle.grad(y_of(*given, eps), given, tensor(dy))
        return tuple(v.numpy() for v in grads)

    def double_backward(ddx, dy, x, gamma, *, eps):
        given = [tensor(v, trained=True) for v in (dy, x, gamma)]
        dy, x, gamma = given
        y = y_of(x, gamma, paddle.zeros_like(gamma), eps)
        (dx,) = paddle.grad(y, [x], dy, create_graph=True)
        return tuple(v.numpy() for v in paddle.grad((tensor(ddx) * dx).sum(), given))

    return {
        "function": function,
        "backward": backward,
        "double_backward": double_backward,
        "correction": 0,
        "features": ["training", "inference", "running", "start", "float64", "large"],
        "versions": {"paddlepaddle": paddle.__version__},
    }
