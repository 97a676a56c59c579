"""Who runs batch norm: this package on each library's arrays, PyTorch itself, and a copy.

Each name maps to a function (case, pass) -> callable that does the pass once and waits for it.
"""

import importlib.util

import batchnorm as bn
from batchnorm.bench.cases import Case
from batchnorm.bench.contestants import CONTESTANTS, EPS, present


def _on_device(module, to_device, wait):
    """This package on arrays of a device, synchronized."""

    def prepare(case: Case, which: str):
        library = __import__(module)
        x, dy, gamma, beta, mean, var = (to_device(library, a) for a in case[:6])
        axis = case.axis
        if which == "forward":
            return lambda: (bn.batch_norm(x, gamma, beta, axis=axis, eps=EPS), wait(library))
        if which == "inference":
            return lambda: (bn.normalize(x, mean, var, gamma, beta, axis=axis, eps=EPS), wait(library))
        _, stats = bn.batch_norm(x, gamma, beta, axis=axis, eps=EPS)
        return lambda: (bn.batch_norm_backward(dy, x, stats, gamma, axis=axis, eps=EPS), wait(library))

    return prepare


def _has_device(module, count):
    try:
        return importlib.util.find_spec(module) is not None and count(__import__(module)) > 0
    except Exception:  # a GPU library without a driver
        return False


LIBRARIES = {name: (c.prepare, c.kernels) for name, c in present().items() if name in CONTESTANTS}
if _has_device("cupy", lambda cupy: cupy.cuda.runtime.getDeviceCount()):
    LIBRARIES["batchnorm on CuPy"] = (
        _on_device(
            "cupy", lambda cp, a: cp.asarray(a), lambda cp: cp.cuda.get_current_stream().synchronize()
        ),
        None,
    )
if _has_device("torch", lambda torch: torch.cuda.device_count()):
    LIBRARIES["batchnorm on PyTorch CUDA"] = (
        _on_device("torch", lambda t, a: t.from_numpy(a).to("cuda"), lambda t: t.cuda.synchronize()),
        None,
    )
