"""The conformance suite on NumPy arrays and the CUDA kernels: `pytest -p cuda_on_host.plugin`."""

import contextlib

import cuda_on_host
from batchnorm import capabilities
from batchnorm.testing import libraries


class OnHost(libraries.NumPy):
    def __init__(self, library, module, device):
        super().__init__("numpy", module, device)

    def missing(self):
        return None if cuda_on_host.COMPILER else "no C++ compiler"

    @contextlib.contextmanager
    def active(self):
        with cuda_on_host.active(cuda_on_host.LIMITS[self.device_name]):
            yield


NAME = "cuda_on_host"
capabilities.LIBRARIES[NAME] = capabilities.Library("numpy", tuple(cuda_on_host.LIMITS), "")
libraries.OWN_WAY[NAME] = OnHost
