"""normalize with given statistics, and folding it into weights."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data, verdict
from batchnorm.testing.oracle import Problem

pytestmark = pytest.mark.operation("inference")


@pytest.mark.parametrize(("shape", "axis"), data.SHAPES, ids=data.IDS)
def test_values(target, shape, axis):
    x = data.batch(shape)
    vector = data.channels(shape, axis)
    gamma, beta = data.parameters(vector)
    mean, var = data.statistics(vector)
    y = target.call(lambda *a: bn.normalize(*a, axis=axis), x, mean, var, gamma, beta)
    verdict.forward(y, Problem(x, gamma, beta, axis=axis, mean=mean, var=var), "float32")


def test_dtypes(target, dtype):
    x = data.batch((40, 3, 7), dtype)
    mean, var = (v.astype("float64" if dtype == "float64" else "float32") for v in data.statistics((3,)))
    y = target.call(bn.normalize, x, mean, var)
    verdict.forward(y, Problem(x, mean=mean, var=var), dtype)


@pytest.mark.parametrize("shape", [(1, 4), (2, 4, 0), (0, 4)])
def test_one_value_or_none(target, shape):
    x = data.batch(shape)
    mean, var = data.statistics((4,))
    y = target.call(bn.normalize, x, mean, var)
    verdict.forward(y, Problem(x, mean=mean, var=var), "float32")


def test_large_offset_does_not_cancel(target):
    x = data.batch((200, 3), mean=1e6)
    mean = np.asarray([1e6, 1e6 + 0.25, 1e6 - 0.5], dtype=np.float32)
    var = np.ones(3, dtype=np.float32)
    y = target.call(bn.normalize, x, mean, var)
    verdict.forward(y, Problem(x, mean=mean, var=var), "float32")


@pytest.mark.operation("out")
def test_out(target):
    x = data.batch((2, 4))
    mean, var = data.statistics((4,))

    def into(x, mean, var):
        out = target.xp.zeros_like(x)
        assert bn.normalize(x, mean, var, out=out) is out
        return out

    verdict.forward(target.call(into, x, mean, var), Problem(x, mean=mean, var=var), "float32")


@pytest.mark.operation("fold")
def test_fold(target):
    mean, var = data.statistics((6,))
    gamma, beta = data.parameters((6,))
    scale, shift = target.call(lambda *a: bn.fold(*a, eps=1e-3), mean, var, gamma, beta)
    expected = gamma / np.sqrt(var.astype(float) + 1e-3)
    verdict.assert_close(scale, expected, abs(expected), "float32", 2, "scale")
    size = abs(beta) + abs(mean * expected)
    verdict.assert_close(shift, beta - mean * expected, size, "float32", 2, "shift")


@pytest.mark.operation("fold")
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("layout", ["OI", "IO", "OIL", "OIHW", "HWIO", "OHWI", "IOHW", "OIDHW"])
def test_fold_weights(target, layout, with_bias):
    sizes = {"O": 4, "I": 3, "L": 5, "H": 2, "W": 3, "D": 2}
    weight = data.batch(tuple(sizes[letter] for letter in layout))
    bias = data.batch((4,)) if with_bias else None
    mean, var = data.statistics((4,))
    gamma, beta = data.parameters((4,))
    fold = bn.fold_linear if len(layout) == 2 else bn.fold_conv
    folded, shift = target.call(lambda *a: fold(*a, layout=layout), weight, bias, mean, var, gamma, beta)
    # A patch of inputs: the layer is a sum over all weights of one output.
    patch = data.batch(weight.shape, seed=9).astype(float)
    rest = tuple(i for i, letter in enumerate(layout) if letter != "O")
    linear = np.sum(weight * patch, axis=rest) + (0 if bias is None else bias)
    expected = gamma * (linear - mean) / np.sqrt(var.astype(float) + 1e-5) + beta
    actual = np.sum(folded * patch, axis=rest) + shift
    size = np.sum(abs(folded * patch), axis=rest) + abs(shift)
    verdict.assert_close(actual, expected, size, "float32", 4, "folded output")
