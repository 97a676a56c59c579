"""Float64 data of any offset at size, against an oracle in extended precision, where there is one."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import verdict
from batchnorm.testing.libraries import targets

WIDER = np.finfo(np.longdouble).eps < 1e-18
SHAPES = {0: (16, 390_625), 1: (8, 16, 220, 221), -1: (390_625, 16)}


@pytest.mark.skipif(not WIDER, reason="long double is no wider than double on this machine")
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("axis", SHAPES)
def test_six_million_values(library, axis):
    pytest.importorskip(library)
    shape = SHAPES[axis]
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal(shape) + 1e8, rng.standard_normal(shape) + 0.5

    def both(x, dy):
        y, stats = bn.batch_norm(x, axis=axis)
        return y, bn.batch_norm_backward(dy, x, stats, axis=axis)[0]

    y, dx = targets(library)[0].call(both, x, dy)

    reduced = tuple(i for i in range(x.ndim) if i != axis % x.ndim)

    def mean(v):
        return np.mean(v, axis=reduced, keepdims=True)

    d = x.astype(np.longdouble)
    d -= mean(d)
    d -= mean(d)  # a naive sum of long doubles loses digits of a mean of 1e8 as well
    std = np.sqrt(mean(d * d) + np.longdouble(1e-5))
    d /= std
    verdict.assert_close(y, d, np.maximum(1, abs(d)), "float64", verdict.FORWARD, "y")
    expected = (dy - (mean(dy.astype(np.longdouble)) + d * mean(dy * d))) / std
    size = float(np.max(abs(dy)) / np.min(std))
    verdict.assert_close(dx, expected, size, "float64", verdict.BACKWARD, "dx")
