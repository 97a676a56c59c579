"""One member that ends in good order, with a message under way that nobody waits for.

python -m members.leaving
"""

import contextlib
import os

import numpy as np

# The fastest backend, whose calls reuse memory so soon that a write to what was freed is noticed.
os.environ.pop("BATCHNORM_KERNELS", None)
import batchnorm as bn

group = bn.distributed.mpi()
layer = bn.BatchNorm(4, group=group)
x = np.random.default_rng(group.rank).normal(3, 2, (5 + group.rank, 4)).astype(np.float32)
layer.backward(layer(x))
with contextlib.suppress(ValueError):
    layer(x[:, :3])
