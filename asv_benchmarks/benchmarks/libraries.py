"""Who runs batch norm: this package on each library's arrays, PyTorch itself, and a copy.

Each name maps to a function (case, pass) -> callable that does the pass once and waits for it.
"""

import importlib
import importlib.util

from batchnorm.bench.cases import Case
from batchnorm.bench.contestants import CONTESTANTS, package, present


def _on_device(module, to_device, wait):
    """This package on arrays of a device, synchronized."""

    def prepare(case: Case, which: str):
        library = importlib.import_module(module)
        call = package(lambda a: to_device(library, a))(case, which)
        return lambda: (call(), wait(library))

    return prepare


def _has_device(module, count):
    try:
        return (
            importlib.util.find_spec(module) is not None and count(importlib.import_module(module)) > 0
        )
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
