"""PyTorch's batch norm: torch.nn.functional.batch_norm, which its modules call."""

from batchnorm.testing.libraries import targets

PEERS = {
    "torch-channels-second": "PyTorch, channels second",
    "torch-channels-last": "PyTorch, memory_format=torch.channels_last",
    "torch-compiled": "PyTorch, torch.compile",
}
ALL = {
    "Squares beyond the range of float32": "y_of_large_numbers",
}
KNOWN = {
    "torch-channels-second": {
        **ALL,
        "The mean is one float32": "y_at_mean y_of_many_values dx dgamma",
        "Inference is x·scale + shift": "inference_by_running_statistics",
    },
    "torch-channels-last": {
        **ALL,
        "The mean is one float32": "y_at_mean y_of_many_values dx dgamma",
        "Results depend on the number of threads": "same_bits_with_threads",
        "Gradients of parameters are sums in one row": "sums_of_many_gradients",
        "Inference is x·scale + shift": "inference_by_running_statistics",
    },
    "torch-compiled": {
        **ALL,
        "The mean is one float32": "y_at_mean y_of_many_values dx dgamma running_variance",
    },
}
"""What is wrong, and the checks that fail by it."""


def peer(name):
    import torch

    target = next(t for t in targets("torch") if t.device_name == "cpu-generic")
    batch_norm = torch.nn.functional.batch_norm
    if name == "torch-compiled":
        torch._dynamo.config.recompile_limit = 1000  # beyond, calls would not be compiled
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        batch_norm = torch.compile(batch_norm, dynamic=True)

    def image(x):
        """Bring x to the memory format, with four axes."""
        if name == "torch-channels-last" and x.numel():
            x = x.reshape(*x.shape, *[1] * (4 - x.ndim))
            return x.contiguous(memory_format=torch.channels_last)
        return x

    def function(x, gamma, beta, mean, var, *, training, momentum, eps):
        new = torch.nn.BatchNorm1d(len(gamma))
        x, gamma, beta = (target.asarray(v) for v in (x, gamma, beta))
        mean = new.running_mean if mean is None else target.asarray(mean).clone()
        var = new.running_var if var is None else target.asarray(var).clone()
        y = batch_norm(image(x), mean, var, gamma, beta, training, momentum, eps).reshape(x.shape)
        return tuple(map(target.to_numpy, (y, mean, var)))

    def backward(dy, x, gamma, beta, *, eps):
        dy, x, gamma, beta = (target.asarray(v) for v in (dy, x, gamma, beta))
        given = [v.requires_grad_() for v in (x, gamma, beta)]
        y = batch_norm(image(x), None, None, gamma, beta, True, 0.1, eps)
        return tuple(map(target.to_numpy, torch.autograd.grad(y, given, image(dy))))

    def double_backward(ddx, dy, x, gamma, *, eps):
        ddx, dy, x, gamma = (target.asarray(v) for v in (ddx, dy, x, gamma))
        dy, x, gamma = (v.requires_grad_() for v in (dy, x, gamma))
        y = batch_norm(image(x), None, None, gamma, None, True, 0.1, eps)
        (dx,) = torch.autograd.grad(y, [x], image(dy), create_graph=True)
        return tuple(map(target.to_numpy, torch.autograd.grad((ddx * dx).sum(), [dy, x, gamma])))

    return {
        "function": function,
        "backward": backward,
        "double_backward": None if name == "torch-compiled" else double_backward,
        "set_threads": torch.set_num_threads,
        "features": [
            *("training", "inference", "running", "start", "mixed"),
            *("float16", "bfloat16", "float64", "large"),
        ],
        "versions": {"torch": torch.__version__},
    }
