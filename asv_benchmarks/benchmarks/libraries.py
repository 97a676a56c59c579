"""Who runs batch norm: this package on each library's arrays, PyTorch itself, and a copy.

Each name maps to a function (case, pass) -> callable that does the pass once and waits for it.
"""

from batchnorm.bench.contestants import CONTESTANTS, present

LIBRARIES = {name: (c.prepare, c.kernels) for name, c in present().items() if name in CONTESTANTS}
