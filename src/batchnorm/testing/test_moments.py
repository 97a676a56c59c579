"""Moments: merging, running statistics, and NIST's certified data sets."""

import importlib.resources
import json

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data, oracle, verdict
from batchnorm.testing.oracle import Problem

pytestmark = pytest.mark.operation("moments")


@pytest.mark.parametrize("shape", [(1, 4), (2, 4, 0), (0, 4), (3, 4, 33), (200, 4), (1057, 4)])
def test_any_number_of_values(target, shape):
    x = data.batch(shape, mean=7.0)
    stats = target.call(bn.moments, x)
    if x.size == 0:
        assert all(np.all(v == 0) for v in stats)
    else:
        verdict.moments(stats, Problem(x))


@pytest.mark.parametrize("mean", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("sizes", [(5,), (1, 40), (100, 3, 0, 50, 1, 7)])
def test_merge(target, sizes, mean):
    x = data.batch((sum(sizes), 4), mean=mean)
    parts = tuple(np.split(x, np.cumsum(sizes)[:-1]))

    def merged(*parts):
        return bn.Moments.merge(*(bn.moments(part) for part in parts))

    verdict.moments(target.call(merged, *parts), Problem(x))


def test_merge_with_nothing_changes_nothing(target):
    x = data.batch((9, 4), mean=100.0)

    def both(x, none):
        return bn.moments(x), bn.Moments.merge(bn.moments(none), bn.moments(x), bn.moments(none))

    alone, merged = target.call(both, x, x[:0])
    np.testing.assert_array_equal(merged.count, alone.count)
    np.testing.assert_allclose(merged.mean, alone.mean, rtol=1e-7)
    np.testing.assert_allclose(merged.var, alone.var, rtol=1e-6)


def test_nan_stays_in_its_channel(target):
    """Through a merge and into running statistics: NaN is not less than 0, nor a maximum with it 0."""
    x = data.batch((20, 4), mean=3.0)
    x[4, 1], x[15, 2] = np.nan, np.inf
    mean, var = data.statistics((4,))

    def run(x, y, mean, var):
        stats = bn.Moments.merge(bn.moments(x), bn.moments(y))
        return stats, bn.update_running(mean, var, stats)

    with np.errstate(all="ignore"):
        stats, moved = target.call(run, x[:11], x[11:], mean, var)
    for v in (stats.mean, stats.var, *moved):
        assert np.isnan(v[1])
        assert not np.isfinite(v[2])
    assert np.all(stats.count == 20)
    whole = Problem(x[:, ::3])
    verdict.moments(bn.Moments(*(v[::3] for v in stats)), whole)


@pytest.mark.operation("where")
def test_merge_weighted(target):
    x, where = data.batch((40, 3), mean=1e4), data.weights((40, 3), "weights")

    def merged(a, b, u, v):
        return bn.Moments.merge(bn.moments(a, where=u), bn.moments(b, where=v))

    stats = target.call(merged, x[:13], x[13:], where[:13], where[13:])
    verdict.moments(stats, Problem(x, where=where))


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_running_statistics(target, momentum, correction):
    batches = tuple(data.batch((11, 3), mean=5.0, seed=s) for s in range(6))
    mean, var = np.zeros(3, dtype=np.float32), np.ones(3, dtype=np.float32)

    def steps(mean, var, *batches):
        for k, x in enumerate(batches, start=1):
            m = 1 / k if momentum is None else momentum
            mean, var = bn.update_running(mean, var, bn.moments(x), momentum=m, correction=correction)
        return mean, var

    actual_mean, actual_var = target.call(steps, mean, var, *batches)
    assert actual_mean.dtype == actual_var.dtype == np.float32
    problems = [Problem(x) for x in batches]
    expected_mean, expected_var = oracle.running(mean, var, problems, momentum, correction)
    verdict.assert_close(actual_mean, expected_mean, 5.0, "float32", 4, "mean")
    verdict.assert_close(actual_var, expected_var, expected_var, "float32", 8, "var")


def _nist():
    folder = importlib.resources.files("batchnorm.testing") / "nist"
    cases = json.loads((folder / "nist.json").read_text())["cases"]
    with (folder / "nist.npz").open("rb") as file:
        arrays = dict(np.load(file))
    return [(case, arrays) for case in cases]


@pytest.mark.dtypes("float32", "float64")
@pytest.mark.parametrize(("case", "arrays"), [pytest.param(*c, id=c[0]["id"]) for c in _nist()])
def test_nist(target, case, arrays, dtype):
    """Mean and variance of the rounded data to 15 digits (4 eps) in float64, and so the certified ones
    as closely as the rounding of the data allows."""
    key = "x" if dtype == "float64" else "x_float32"
    x = arrays[case["inputs"][key]["key"]].reshape(-1, 1)
    stats = target.call(bn.moments, x)
    verdict.moments(stats, Problem(x))

    wide = "float64" if stats.var.dtype == np.float64 else "float32"
    exact = case["params"][f"exact_{dtype}_data"]
    mean, var = float(exact["mean"]), float(exact["bn_var"])
    verdict.assert_close(stats.mean[0], mean, abs(mean), wide, 4, "mean")
    verdict.assert_close(stats.var[0], var, abs(var), wide, 4, "variance")

    n, sd = case["params"]["n"], float(case["params"]["certified_sd"])
    digits = _digits(np.sqrt(float(stats.var[0]) * (n / (n - 1))), sd)
    carried = 15.0 if wide == "float64" else 6.6  # 2 eps of the standard deviation
    allowed = min(case["params"]["best_possible_lre_sd"][dtype], carried)
    assert digits >= allowed - 0.05, f"{digits:.2f} digits, the data allow {allowed}"


def _digits(got, certified):
    return 15.0 if got == certified else min(15.0, -np.log10(abs(got - certified) / abs(certified)))
