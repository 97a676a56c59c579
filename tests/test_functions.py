"""Corners of the functions that no library changes."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data, verdict
from batchnorm.testing.libraries import kernels
from batchnorm.testing.oracle import Problem

X = data.batch((6, 4))
V = data.batch((4,))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e15, 1e25, 1e30])
def test_any_scale(scale):
    """Gradients at the edges of float32, where 1/std**3 is no longer a number."""
    x = (data.batch((200, 3), "float64") * scale).astype(np.float32)
    dy = data.batch((200, 3), seed=5)
    y, stats = bn.batch_norm(x, eps=0.0)
    expected = Problem(x, eps=0.0)
    verdict.forward(y, expected, "float32")
    grads = bn.batch_norm_backward(dy, x, stats, eps=0.0)
    verdict.backward(grads, expected.backward(dy), "float32", "float32")


@pytest.mark.parametrize("scale", [1e-12, 1e12, 1e15])
def test_any_scale_without_float64(scale):
    strict = pytest.importorskip("array_api_strict")
    device = strict.Device("no_float64")
    x = (data.batch((200, 3), "float64") * scale).astype(np.float32)
    dy = data.batch((200, 3), seed=5)
    boxed, boxed_dy = (strict.asarray(a, device=device) for a in (x, dy))
    _, stats = bn.batch_norm(boxed, eps=0.0)
    grads = bn.batch_norm_backward(boxed_dy, boxed, stats, eps=0.0)
    cpu = strict.Device("CPU_DEVICE")
    grads = tuple(np.asarray(g.to_device(cpu)) for g in grads)
    verdict.backward(grads, Problem(x, eps=0.0).backward(dy), "float32", "float32")


def test_near_constant_channels():
    """Two values, one unit in the last place apart, far from zero: float32 without float64."""
    strict = pytest.importorskip("array_api_strict")
    x = np.where(data.batch((1000, 8)) < 0, np.float32(1.0), np.nextafter(np.float32(1), np.float32(2)))
    boxed = strict.asarray(x, device=strict.Device("no_float64"))
    y, _ = bn.batch_norm(boxed, eps=1e-18)
    y = np.asarray(y.to_device(strict.Device("CPU_DEVICE")))
    verdict.forward(y, Problem(x, eps=1e-18), "float32")


def test_a_narrow_gradient_of_wide_data():
    x, dy = data.batch((50, 3)), data.batch((50, 3), "float16", seed=5)
    mean, var = data.statistics((3,))
    grads = bn.normalize_backward(dy, x, mean, var, stats_grad=True)
    expected = Problem(x, mean=mean, var=var).backward(dy)
    verdict.backward(grads, expected, "float32", "float32")


def test_parameter_gradients_are_not_views_of_dy():
    x, dy = data.batch((3, 4), "float64"), data.batch((3, 4), "float64", seed=5)
    ones, zeros = np.ones((3, 4)), np.zeros((3, 4))
    before = dy.copy()
    dx, _, dbeta = bn.normalize_backward(dy, x, zeros, 3 * ones, axis=(0, 1), out=dy)
    assert dx is dy
    np.testing.assert_array_equal(dbeta, before)


def test_numpy_scalars_are_numbers():
    with pytest.raises(ValueError, match=r"eps: got -1\.0, expected a number >= 0"):
        bn.batch_norm(X, eps=np.float64(-1))
    with pytest.raises(ValueError, match=r"momentum: got 5\.0, expected a number in \[0, 1\]"):
        bn.update_running(V, V * V, bn.moments(X), momentum=np.float32(5))
    with pytest.raises(TypeError, match="eps: got array"):
        bn.batch_norm(X, eps=np.asarray("a"))
    with pytest.raises(ValueError, match="momentum: got"):
        bn.update_running(V, V * V, bn.moments(X), momentum=np.asarray(7.0))
    torch = pytest.importorskip("torch")
    mean, var = torch.zeros(4), torch.ones(4)
    mean, _ = bn.update_running(mean, var, bn.moments(torch.from_numpy(X)), momentum=np.float64(0.5))
    np.testing.assert_allclose(mean.numpy(), 0.5 * X.mean(axis=0), atol=1e-7)


def test_messages_name_what_the_caller_named():
    with pytest.raises(
        ValueError, match=r"var: got shape \(2,\), expected \(4,\), the channels of mean at"
    ):
        bn.update_running(V, V[:2], bn.moments(X))
    with pytest.raises(ValueError, match=r"axis: got 1, expected \(\) for 0-d x, which has no axis"):
        bn.batch_norm(np.asarray(1.0))
    with pytest.raises(
        ValueError, match="layout: got 'O', expected different letters, O and I among them"
    ):
        bn.fold_linear(V, None, V, V, layout="O")
    with pytest.raises(TypeError, match="x: got a MaskedArray, expected a plain array"):
        bn.batch_norm(np.ma.masked_array(X, X < 0))


def test_merging_narrow_moments():
    half = [np.asarray([v], np.float16) for v in (60_000, 2.0, 3.0)]
    merged = bn.Moments.merge(bn.Moments(*half), bn.Moments(*half))
    assert merged.count.dtype == np.float32
    np.testing.assert_allclose(merged.count, 120_000)
    np.testing.assert_allclose(merged.mean, 2)


def test_a_frozen_norm_passes_gradients_where_x_is_infinite():
    x, dy = X.copy(), data.batch((6, 4), seed=5)
    x[2, 1] = np.inf
    with np.errstate(invalid="ignore"):
        dx, _, _ = bn.normalize_backward(dy, x, np.zeros(4, np.float32), np.ones(4, np.float32), eps=0.0)
    np.testing.assert_array_equal(dx, dy)


def test_sums_of_equal_terms_do_not_drift():
    """Rounding of a sum of equal terms goes one way: 5 eps here, were the sum not corrected."""
    x = np.tile(np.where(np.arange(4096) % 2, 1.1, 1.3)[:, None], (1, 8))
    expected = Problem(x)
    var = expected.flat(expected.var)
    for name, bound in (("generic", 1), ("numpy", 2), ("native", 2)):
        with kernels(name):
            verdict.assert_close(bn.moments(x).var, var, var, "float64", bound, name)


def test_an_error_leaves_out_alone():
    """Every check comes before the first write."""
    out = np.full((6, 4), 7, np.float32)
    stats = bn.moments(X)
    wrong = [
        lambda: bn.batch_norm(X, V[:2], out=out),
        lambda: bn.batch_norm(X, eps=-1, out=out),
        lambda: bn.batch_norm(X, where=-abs(X), out=out),
        lambda: bn.batch_norm(X, group=3, out=out),
        lambda: bn.batch_norm_backward(X, X, None, out=out),
        lambda: bn.batch_norm_backward(X[:2], X, stats, out=out),
        lambda: bn.batch_norm_backward(X, X, stats, V[:3], out=out),
        lambda: bn.normalize(X, V, V[:1], out=out),
        lambda: bn.normalize_backward(X, X, V[:1], V, out=out),
        lambda: bn.batch_norm(X.astype(np.float64), out=out),
    ]
    for call in wrong:
        with pytest.raises((TypeError, ValueError), match="got .*, expected"):
            call()
    assert np.all(out == 7)
    out.flags.writeable = False
    with pytest.raises(
        ValueError, match="out: got a read-only array, expected one that can be written to"
    ):
        bn.batch_norm(X, out=out)
