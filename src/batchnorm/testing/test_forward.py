"""batch_norm: values for every shape, axis, dtype and memory layout."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data, verdict
from batchnorm.testing.oracle import Problem

pytestmark = pytest.mark.operation("forward")


@pytest.mark.parametrize(("shape", "axis"), data.SHAPES, ids=data.IDS)
def test_values(target, shape, axis):
    x = data.batch(shape, mean=3.0)
    gamma, beta = data.parameters(data.channels(shape, axis))
    y, stats = target.call(lambda *a: bn.batch_norm(*a, axis=axis, eps=1e-3), x, gamma, beta)
    expected = Problem(x, gamma, beta, axis=axis, eps=1e-3)
    verdict.forward(y, expected, "float32")
    verdict.moments(stats, expected)


def test_dtypes(target, dtype):
    x = data.batch((40, 3, 7), dtype, mean=2.0)
    gamma, beta = data.parameters((3,), "float64" if dtype == "float64" else "float32")
    y, _ = target.call(bn.batch_norm, x, gamma, beta)
    verdict.forward(y, Problem(x, gamma, beta), dtype)


@pytest.mark.dtypes("float16", "bfloat16")
def test_parameters_of_16_bits(target, dtype):
    x = data.batch((40, 3), dtype)
    gamma, beta = data.parameters((3,), dtype)
    y, _ = target.call(bn.batch_norm, x, gamma, beta)
    verdict.forward(y, Problem(x, gamma, beta), dtype)


@pytest.mark.parametrize("given", ["gamma", "beta", "neither"])
def test_optional_parameters(target, given):
    x = data.batch((12, 5))
    gamma, beta = data.parameters((5,))
    gamma, beta = gamma if given == "gamma" else None, beta if given == "beta" else None
    y, _ = target.call(bn.batch_norm, x, gamma, beta)
    verdict.forward(y, Problem(x, gamma, beta), "float32")


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_layouts(target, array_layout, axis):
    x = data.LAYOUTS[array_layout](data.batch((40, 7, 6), mean=5.0))
    y, _ = target.call(lambda x: bn.batch_norm(x, axis=axis), x)
    verdict.forward(y, Problem(x, axis=axis), "float32")


def test_constant_channel(target):
    x = np.full((50, 2), 0.1, dtype=np.float32)
    y, stats = target.call(bn.batch_norm, x)
    verdict.forward(y, Problem(x), "float32")
    assert np.all(stats.var <= 1e-16)  # 0 but where a compiler fuses the subtraction of the mean


def test_nan_stays_in_its_channel(target):
    x = data.batch((20, 3))
    x[4, 1] = np.nan
    y, stats = target.call(bn.batch_norm, x)
    assert np.all(np.isnan(y[:, 1]))
    verdict.forward(y[:, ::2], Problem(x[:, ::2]), "float32")
    assert np.isnan(stats.mean[1])


@pytest.mark.operation("out")
@pytest.mark.parametrize("aliased", [False, True])
def test_out(target, aliased):
    x = data.batch((12, 5))

    def into(x):
        out = target.xp.zeros_like(x)
        source = out if aliased else x
        if aliased:
            out[...] = x
        y, _ = bn.batch_norm(source, out=out)
        assert y is out
        return y

    verdict.forward(target.call(into, x), Problem(x), "float32")
