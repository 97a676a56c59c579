"""tinygrad: nn.BatchNorm on its CPU backend, which needs the program clang."""

PEERS = {"tinygrad": "tinygrad, nn.BatchNorm"}
KNOWN = {
    "tinygrad": {
        "The mean is one float32": "y_at_mean y_of_many_values dx dgamma",
        "Arithmetic in 16 bits": "y_of_float16",
        "Squares beyond the range of float32": "y_of_large_numbers",
        "An empty batch poisons the running mean": "empty_batch",
        "The second derivative lacks a term": "second_derivative",
    },
}
"""What is wrong, and the checks that fail by it."""


def peer(name):
    import importlib.metadata
    import shutil

    if shutil.which("clang") is None:
        raise ImportError("tinygrad's CPU backend needs the program clang")
    from tinygrad import Context, Tensor, nn

    def layer_of(gamma, beta, mean, var, momentum=0.1, eps=1e-5):
        layer = nn.BatchNorm(len(gamma), eps=eps, momentum=momentum)
        layer.weight, layer.bias = gamma, beta
        if mean is not None:
            layer.running_mean, layer.running_var = Tensor(mean), Tensor(var)
        return layer

    def function(x, gamma, beta, mean, var, *, training, **settings):
        layer = layer_of(Tensor(gamma), Tensor(beta), mean, var, **settings)
        with Context(TRAINING=int(training)):
            y = layer(Tensor(x)).numpy()
        return y, layer.running_mean.numpy(), layer.running_var.numpy()

    def y_of(x, gamma, beta, eps):
        with Context(TRAINING=1):
            return layer_of(gamma, beta, None, None, eps=eps)(x)

    def backward(dy, x, gamma, beta, *, eps):
        given = [Tensor(v) for v in (x, gamma, beta)]
        grads = y_of(*given, eps).gradient(*given, gradient=Tensor(dy))
        return tuple(v.numpy() for v in grads)

    def double_backward(ddx, dy, x, gamma, *, eps):
        given = [Tensor(v) for v in (dy, x, gamma)]
        dy, x, gamma = given
        (dx,) = y_of(x, gamma, Tensor.zeros(*gamma.shape), eps).gradient(x, gradient=dy)
        return tuple(v.numpy() for v in (Tensor(ddx) * dx).sum().gradient(*given))

    return {
        "function": function,
        "backward": backward,
        "double_backward": double_backward,
        "features": ["training", "inference", "running", "start", "float16", "large"],
        "versions": {"tinygrad": importlib.metadata.version("tinygrad")},
    }
