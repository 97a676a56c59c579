"""check_batch_norm: a right batch norm passes, and of each planted fault a check says what is wrong."""

import subprocess
import sys

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import CHECKS, FEATURES, BatchNormError, check_batch_norm
from batchnorm.testing.checking import applicable, implementation_of, run

ALL = [name for name in FEATURES if name != "large"]
EXTRA = {"y_of_many_values", "sums_of_many_gradients"}
"""Checks of large arrays."""


THREADS = [1]


def norm(
    x,
    gamma,
    beta,
    mean,
    var,
    *,
    training,
    momentum,
    eps,
    where=None,
    axis=1,
    shards=1,
    fault=None,
    correction=1,
):
    """Batch norm by the textbook, in NumPy and float64; or with a fault."""
    if mean is None:
        mean = np.full(gamma.shape, 0.0 if fault != "starts at 1" else 1.0, gamma.dtype)
        var = np.ones_like(gamma)
        if fault == "starts with a variance of 0":
            var = np.zeros_like(gamma)
        if fault == "corrected as if it started at 0":
            y, mean, var = norm(x, gamma, beta, mean, var, training=training, momentum=momentum, eps=eps)
            return (y, mean / momentum, var / momentum) if training else (y, mean, var)
    if fault in ("parts by themselves", "a mean of means") and shards > 1:
        named = {"training": training, "momentum": momentum, "eps": eps}
        parts = np.split(x, shards)
        kept = [None] * shards if where is None else np.split(where, shards)
        if fault == "parts by themselves":
            found = [
                norm(p, gamma, beta, mean, var, where=w, **named)
                for p, w in zip(parts, kept, strict=True)
            ]
            return np.concatenate([y for y, *_ in found]), *found[0][1:]
        wide = x.astype(np.float64)
        w = np.ones(x.shape) if where is None else np.broadcast_to(where, x.shape).astype(float)
        rows = zip(np.split(wide, shards), np.split(w, shards), strict=True)
        sums = [[((p**k) * w).sum((0, 2)) / w.sum((0, 2)) for k in (1, 2)] for p, w in rows]
        m, s = np.mean(sums, axis=0)
        v, n = s - m * m, w.sum((0, 2))
        shape = (1, -1, 1)
        y = gamma.reshape(shape) * (wide - m.reshape(shape)) / np.sqrt(v + eps).reshape(shape)
        y = (y + beta.reshape(shape)).astype(x.dtype)
        new = mean + momentum * (m - mean), var + momentum * (v * n / (n - 1) - var)
        return y, *(v.astype(gamma.dtype) for v in new)
    axis = axis if fault == "axis is never negative" else axis % x.ndim
    kept = axis if axis >= 0 else axis + x.ndim + 1
    reduced = tuple(i for i in range(x.ndim) if i != kept)
    if fault == "statistics over the channels":
        reduced = (kept,)
    if fault == "statistics over everything":
        reduced = tuple(range(x.ndim))
    vector = [1] * x.ndim
    vector[kept] = -1
    wide = x.astype(np.float64)
    if fault == "statistics in float16" and x.dtype == np.float16:
        wide = x
    if fault == "float64 through float32":
        wide = x.astype(np.float32).astype(np.float64)
    if fault == "float32 arithmetic":
        wide = x.astype(np.float32)
    w = np.ones(x.shape) if where is None else np.broadcast_to(where, x.shape).astype(float)
    w = w.astype(wide.dtype)
    if where is not None and fault != "0 times NaN":
        wide = np.where(w > 0, wide, 0)
    n = np.sum(w if fault != "a mask does not count" else np.ones(x.shape), reduced, keepdims=True)
    if where is not None and not np.any(where) and fault != "nothing is divided by nothing":
        raise ValueError("nothing is left")
    if x.shape[kept] and x.size // x.shape[kept] < 1 and fault != "nothing is divided by nothing":
        return x.copy(), mean, var
    if training:
        m = np.sum(w * wide, reduced, keepdims=True) / n
        if fault == "E[x²] − E[x]²":
            s = wide.astype(np.float32)
            v = np.sum(s * s, reduced, keepdims=True) / np.float32(n) - np.float32(m) ** 2
        else:
            v = np.sum(w * (wide - m) ** 2, reduced, keepdims=True) / n
        if fault == "squares in float32":
            v = np.mean(np.square((wide - m).astype(np.float32)), reduced, keepdims=True)
        if fault == "n − 1 in the normalizing variance":
            v = v * n / (n - 1)
    else:
        m, v = mean.reshape(vector), var.reshape(vector)
        if fault == "inference by the batch":
            m, v = wide.mean(reduced, keepdims=True), wide.var(reduced, keepdims=True)
    std = np.sqrt(v + eps)
    if fault == "eps outside of the root":
        std = np.sqrt(v) + eps
    if fault == "eps is always 1e-5":
        std = np.sqrt(v + 1e-5)
    shown = x.astype(np.float64) if wide.dtype == np.float64 and "float32" not in str(fault) else wide
    if fault == "NaN is hidden":
        shown = np.nan_to_num(shown)
        m, v = np.nan_to_num(m), np.nan_to_num(v)
        std = np.sqrt(v + eps)
    if fault == "scale and shift" and not training:
        a = (gamma.reshape(vector) / std).astype(np.float32)
        y = x * a + (beta.reshape(vector) - m * a).astype(np.float32)
    else:
        y = gamma.reshape(vector) * ((shown - m) / std)
        y = y + beta.reshape(vector) if fault != "beta is forgotten" else y
    if fault == "in place":
        x[...] = y
    if fault == "bits of threads":
        y = y + THREADS[0] * 1e-6
    if fault == "other bits":
        y = y + np.random.default_rng().normal(size=()) * 1e-6
    y = y.astype(x.dtype if fault != "y is float32" else np.float32)
    if not training and fault != "inference updates":
        return y, mean, var
    n1 = n - correction if fault != "no correction" else n
    if fault == "the batch's size counts":
        n1, n = x.size / x.shape[kept] - correction, x.size / x.shape[kept]
    with np.errstate(divide="ignore", invalid="ignore"):
        batch = m.reshape(-1), (v * n / (n1 if fault == "0 / 0" else np.maximum(n1, 1))).reshape(-1)
    p = momentum if fault != "momentum of the old value" else 1 - momentum
    new = [(old + p * (b - old)).astype(old.dtype) for old, b in zip((mean, var), batch, strict=True)]
    if fault == "running statistics in the dtype of the data":
        new = [v.astype(x.dtype).astype(v.dtype) for v in new]
    if fault == "float64 statistics in float32":
        new = [v.astype(np.float32).astype(v.dtype) for v in new]
    return (y, *new)


def gradients(dy, x, gamma, beta, *, eps, fault=None):
    reduced = tuple(i for i in range(x.ndim) if i != 1)
    vector = [1, -1] + [1] * (x.ndim - 2)
    wide, g = x.astype(np.float64), dy.astype(np.float64)
    m, v = wide.mean(reduced, keepdims=True), wide.var(reduced, keepdims=True)
    r = 1 / np.sqrt(v + eps)
    hat = (wide - m) * r
    if fault == "x̂ from y":
        y = gamma.reshape(vector) * hat + beta.reshape(vector)
        with np.errstate(invalid="ignore", divide="ignore"):
            hat = (y - beta.reshape(vector)) / gamma.reshape(vector)
    sums = g.sum(reduced, keepdims=True), (g * hat).sum(reduced, keepdims=True)
    if fault == "Σ dy·x − mean·Σ dy":
        s = np.float32
        dx_sum = (dy.astype(s) * x.astype(s)).sum(reduced, keepdims=True) - s(m) * s(sums[0])
        sums = sums[0], dx_sum * s(r)
    n = x.size // x.shape[1]
    through = sums[0] / n + hat * sums[1] / n
    if fault == "no term of the variance":
        through = sums[0] / n
    if fault == "no term of the mean":
        through = hat * sums[1] / n
    if fault == "statistics are constants":
        through = 0
    dx = (gamma.reshape(vector) * r * (g - through)).astype(x.dtype)
    if fault == "the root without eps":
        with np.errstate(divide="ignore", invalid="ignore"):
            dx = dx / (np.sqrt(v) * r)
    dbeta = sums[0].ravel() if fault != "a mean for a sum" else sums[0].ravel() / n
    return dx, sums[1].ravel().astype(gamma.dtype), dbeta.astype(gamma.dtype)


def faulty(fault):
    def function(*arguments, **named):
        return norm(*arguments, **named, fault=fault)

    def backward(*arguments, **named):
        return gradients(*arguments, **named, fault=fault)

    return function, backward


def second_derivatives(ddx, dy, x, gamma, *, eps, fault=None):
    """The derivatives of sum(ddx * dx), by central differences in longdouble."""
    given = [v.astype(np.longdouble) for v in (dy, x, gamma)]
    step, axes, shape = np.longdouble(1e-6), (0, 2), (1, -1, 1)
    mean = given[1].mean(axes, keepdims=True)

    def value():
        dy, x, gamma = given
        d = x - x.mean(axes, keepdims=True)
        r = 1 / np.sqrt((d * d).mean(axes, keepdims=True) + eps)
        outer = x - mean if fault == "the mean is detached" else d  # of the variance's derivative
        through = dy.mean(axes, keepdims=True) + outer * r * (dy * d * r).mean(axes, keepdims=True)
        return np.sum(ddx * gamma.reshape(shape) * r * (dy - through))

    found = []
    for v in given:
        slopes = np.zeros_like(v)
        for i in np.ndindex(v.shape):
            here = v[i]
            v[i] = here + step
            above = value()
            v[i] = here - step
            slopes[i] = (above - value()) / (2 * step)
            v[i] = here
        found.append(slopes.astype(np.float32))
    if fault == "dx is a constant":
        found = [np.zeros_like(v) for v in found]
    if fault == "gamma is a constant":
        found[2] = np.zeros_like(found[2])
    return found


def checked(fault, only=None):
    """Run all checks, or only some, of the batch norm of this file, with everything that it has."""
    function, backward = faulty(fault)

    def second(*arguments, **named):
        return second_derivatives(*arguments, **named, fault=fault)

    def set_threads(threads):
        THREADS[0] = threads

    given = {"backward": backward, "double_backward": second, "set_threads": set_threads}
    if only is None:
        return check_batch_norm(function, **given, features=ALL, on_fail="return")
    implementation = implementation_of(function, **given, features=ALL)
    return [
        run(implementation, check, parameters)
        for check, parameters in applicable(implementation)
        if check in only
    ]


def test_a_right_one_passes():
    records = checked(None)
    assert [str(r) for r in records if not r.passed] == []
    assert {r.check for r in records} == {*CHECKS} - EXTRA


# Fault, and the check whose name says what is wrong.
FAULTS = {
    "E[x²] − E[x]²": "y_at_mean",
    "float32 arithmetic": "y_at_mean",
    "n − 1 in the normalizing variance": "variance_of_the_population",
    "eps outside of the root": "eps_inside_of_the_root",
    "eps is always 1e-5": "eps_inside_of_the_root",
    "statistics in float16": "y_of_float16",
    "float64 through float32": "y_of_float64",
    "squares in float32": "y_of_large_numbers",
    "statistics over the channels": "statistics_of_each_channel",
    "statistics over everything": "statistics_of_each_channel",
    "axis is never negative": "y_at_negative_axis",
    "beta is forgotten": "constant_channel_is_beta",
    "y is float32": "y_of_float64",
    "NaN is hidden": "nan_stays_in_its_channel",
    "in place": "inputs_are_unchanged",
    "other bits": "same_bits_again",
    "0 / 0": "one_value_per_channel",
    "nothing is divided by nothing": "empty_batch",
    "momentum of the old value": "running_mean",
    "no correction": "running_variance",
    "inference by the batch": "inference_by_running_statistics",
    "scale and shift": "inference_by_running_statistics",
    "inference updates": "inference_updates_nothing",
    "a mask does not count": "masked_y",
    "0 times NaN": "masked_nan",
    "the batch's size counts": "masked_running_variance",
    "no term of the variance": "dx",
    "no term of the mean": "dx",
    "statistics are constants": "dx",
    "Σ dy·x − mean·Σ dy": "dgamma",
    "x̂ from y": "dgamma_where_gamma_is_0",
    "a mean for a sum": "dbeta",
    "the root without eps": "dx_of_a_constant_channel",
    "dx is a constant": "second_derivative",
    "the mean is detached": "second_derivative",
    "gamma is a constant": "second_derivative",
    "bits of threads": "same_bits_with_threads",
    "starts at 1": "start_of_running_statistics",
    "starts with a variance of 0": "start_of_running_statistics",
    "corrected as if it started at 0": "first_batch",
    "running statistics in the dtype of the data": "running_statistics_of_float16",
    "float64 statistics in float32": "running_mean_of_float64",
    "parts by themselves": "sharded_y",
    "a mean of means": "sharded_masked_y",
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    assert not all(r.passed for r in checked(fault, [FAULTS[fault]]))


def test_nothing_that_is_masked_or_empty_is_divided():
    records = checked("nothing is divided by nothing", ["empty_batch", "fully_masked"])
    assert [r.passed for r in records] == [False, False]


def ours(x, gamma, beta, mean, var, *, training, momentum, eps, where=None, axis=1):
    if not training:
        return bn.normalize(x, mean, var, gamma, beta, axis=axis, eps=eps), mean, var
    y, stats = bn.batch_norm(x, gamma, beta, axis=axis, eps=eps, where=where)
    return y, *bn.update_running(mean, var, stats, momentum=momentum)


def our_gradients(dy, x, gamma, beta, *, eps):
    return bn.batch_norm_backward(dy, x, bn.moments(x), gamma, eps=eps)


def our_second_derivatives(ddx, dy, x, gamma, *, eps):
    return bn.batch_norm_double_backward(ddx, None, None, dy, x, bn.moments(x), gamma, eps=eps)


@pytest.mark.parametrize("kernels", ["native", "numpy", "generic"])
def test_this_package_passes(kernels):
    bn.set_kernels(kernels)
    try:
        check_batch_norm(
            ours,
            backward=our_gradients,
            double_backward=our_second_derivatives,
            set_threads=bn.set_num_threads,
            features=[name for name in ALL if name not in ("shards", "start")],
        )
    finally:
        bn.set_kernels(None)


def test_pytorch_at_large_means():
    torch = pytest.importorskip("torch")

    def function(x, gamma, beta, mean, var, *, training, momentum, eps):
        mean, var = mean.clone(), var.clone()
        given = (x, mean, var, gamma, beta, training, momentum, eps)
        return torch.nn.functional.batch_norm(*given), mean, var

    records = check_batch_norm(function, xp=torch, on_fail="return")
    wrong = {r.check for r in records if not r.passed}
    assert "y_at_mean" not in wrong or all(
        r.parameters["mean"] > 0 for r in records if r.check == "y_at_mean" and not r.passed
    )
    assert not wrong & {"running_mean", "variance_of_the_population", "eps_inside_of_the_root"}


def test_what_is_done_about_failures():
    function, _ = faulty("eps outside of the root")
    with pytest.raises(BatchNormError, match=r"eps_inside_of_the_root\(\): off by .* eps"):
        check_batch_norm(function)
    with pytest.warns(UserWarning, match="eps_inside_of_the_root"):
        check_batch_norm(function, on_fail="warn")
    known = {"eps_inside_of_the_root": "as the framework has it"}
    wrong = {r.check for r in check_batch_norm(function, on_fail="return") if not r.passed}
    records = check_batch_norm(function, expected_failures=dict.fromkeys(wrong, "known") | known)
    assert {r.expected for r in records if r.check == "eps_inside_of_the_root"} == {*known.values()}
    right, _ = faulty(None)
    with pytest.raises(BatchNormError, match="eps_inside_of_the_root: expected to fail .* remove it"):
        check_batch_norm(right, expected_failures=known)


WRONG = {
    "function": (lambda: check_batch_norm(3), TypeError),
    "backward": (lambda: check_batch_norm(ours, backward=3), TypeError),
    "features": (lambda: check_batch_norm(ours, features=["speed"]), ValueError),
    "xp": (lambda: check_batch_norm(ours, xp=3), TypeError),
    "correction": (lambda: check_batch_norm(ours, correction=2), ValueError),
    "expected_failures": (lambda: check_batch_norm(ours, expected_failures={"y": "?"}), ValueError),
    "on_fail": (lambda: check_batch_norm(ours, on_fail="ignore"), ValueError),
}


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_arguments(argument):
    call, kind = WRONG[argument]
    with pytest.raises(kind, match=f"^{argument}: got .*, expected "):
        call()


PROGRAM = """
import numpy as np
from batchnorm.testing import parametrize_with_checks


def norm(x, gamma, beta, mean, var, *, training, momentum, eps):
    m, v = (x.mean(0, keepdims=True), x.var(0, keepdims=True)) if training else (mean, var)
    return x, mean, var


@parametrize_with_checks(norm, expected_failures={"y_at_mean": "it does nothing"})
def test_batch_norm(check):
    check()
"""


def test_one_test_for_each_check(tmp_path):
    (tmp_path / "test_mine.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert "4 xfailed" in done.stdout, done.stdout[-2000:]
    assert "test_batch_norm[variance_of_the_population]" in done.stdout
    assert done.returncode == 1
