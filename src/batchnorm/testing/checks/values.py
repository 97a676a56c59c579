"""Checks of y: accuracy, dtypes, and batches that are not like others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from batchnorm.testing import data
from batchnorm.testing.checks.implementation import Implementation, as_numpy, or_an_error
from batchnorm.testing.oracle import Problem
from batchnorm.testing.verdict import EPS, worst

Array = Any


def judge_y(impl: Implementation, x: Array, dtype: str, axis: int = 1, **settings: Any) -> float:
    """Return the error of y, in eps of the size of its terms."""
    vectors = impl.parameters(x.shape[axis], dtype)
    named = {"axis": axis} if axis != 1 else {}
    y = impl.forward(x, vectors, **named, **settings)[0]
    assert y.dtype.name == dtype, f"y has the dtype {y.dtype}, and x {dtype}"
    where = settings.get("where")
    right = Problem(x, *vectors[:2], axis=axis, eps=settings.get("eps", 1e-5), where=where)
    if where is not None:
        kept = np.broadcast_to(where, x.shape)
        return worst(y[kept], right.y[kept], right.size[kept], EPS[dtype])
    return worst(y, right.y, right.size, EPS[dtype])


def y_at_mean(impl: Implementation, mean: float) -> float:
    """Judge y of data with a mean and a standard deviation of 1."""
    return judge_y(impl, data.batch((16, 6, 50), mean=mean), "float32")


def y_of_many_values(impl: Implementation) -> float:
    """Judge y of 25 million values with a mean of 100."""
    return judge_y(impl, data.batch((32, 64, 111, 110), mean=100.0), "float32")


def y_with_channels_last(impl: Implementation, mean: float) -> float:
    """Judge y of channels last."""
    return judge_y(impl, data.batch((16, 50, 6), mean=mean), "float32", axis=-1)


def y_at_negative_axis(impl: Implementation) -> float:
    """Judge y of an axis counted from the end."""
    return judge_y(impl, data.batch((5, 4, 3, 6)), "float32", axis=-2)


def y_of_dtype(impl: Implementation, dtype: str) -> float:
    """Judge y of another dtype, with float32 parameters where it has 16 bits and they may differ."""
    return judge_y(impl, data.batch((64, 4, 40), dtype, mean=3.0), dtype)


def y_with_float64_parameters(impl: Implementation) -> float:
    """Judge y of float32 data with float64 parameters."""
    x, vectors = data.batch((16, 6, 50)), impl.parameters(6, "float64")
    y = impl.forward(x, vectors)[0]
    assert y.dtype.name == "float32", f"y has the dtype {y.dtype}, and x float32"
    right = Problem(x, *vectors[:2])
    return worst(y, right.y, right.size, EPS["float32"])


def y_of_large_numbers(impl: Implementation) -> float:
    """Judge y of numbers whose squares float32 does not hold."""
    return judge_y(impl, data.batch((16, 6, 50), std=1e20), "float32")


def eps_inside_of_the_root(impl: Implementation) -> float:
    """Judge y of a variance that is small beside eps."""
    return judge_y(impl, data.batch((16, 6, 50), std=1e-2), "float32", eps=1e-2)


def variance_of_the_population(impl: Implementation) -> float:
    """Judge y of two values per channel, where Bessel's correction is a factor of 2."""
    return judge_y(impl, data.batch((2, 6)), "float32")


def statistics_of_each_channel(impl: Implementation) -> float:
    """Judge y of channels with different means and spreads."""
    x = data.batch((40, 6, 7)) * np.arange(1, 7, dtype=np.float32)[:, None]
    return judge_y(impl, x + np.arange(-3, 3, dtype=np.float32)[:, None], "float32")


def constant_channel_is_beta(impl: Implementation) -> float:
    """Judge y where all values are equal."""
    x = np.full((50, 3), 0.1, np.float32)
    vectors = impl.parameters(3)
    y = impl.forward(x, vectors)[0]
    size = 1 + 2 * 0.1 / np.sqrt(1e-5)  # of x / √eps, where gamma is at most 2
    return worst(y, np.broadcast_to(vectors[1], x.shape).astype(float), size, EPS["float32"])


def nan_stays_in_its_channel(impl: Implementation) -> float:
    """Judge the other channels where one has a NaN, which its own has to show."""
    x = data.batch((20, 3, 4))
    x[4, 1, 2] = np.nan
    vectors = impl.parameters(3)
    y = impl.forward(x, vectors)[0]
    assert np.isnan(y[:, 1]).any(), "the NaN is gone"
    others = x[:, ::2]
    right = Problem(others, *(v[::2] for v in vectors[:2]))
    return worst(y[:, ::2], right.y, right.size, EPS["float32"])


def one_value_per_channel(impl: Implementation) -> float:
    """Expect an error, or numbers: a variance of one value is 0, or not there."""
    found = or_an_error(lambda: impl.forward(data.batch((1, 3)), impl.parameters(3)))
    for name, v in zip(("y", "running mean", "running var"), found or (), strict=False):
        assert v is None or np.all(np.isfinite(v)), f"{name} is not finite, and nothing is said"
    return 0.0


def empty_batch(impl: Implementation) -> float:
    """Expect an error, or an empty y and running statistics that are still numbers."""
    found = or_an_error(lambda: impl.forward(np.zeros((0, 3, 4), np.float32), impl.parameters(3)))
    if found is not None:
        assert found[0].shape == (0, 3, 4), f"y has the shape {found[0].shape}"
        for name, v in zip(("running mean", "running var"), found[1:], strict=True):
            assert v is None or np.all(np.isfinite(v)), f"{name} is not finite, and nothing is said"
    return 0.0


def inputs_are_unchanged(impl: Implementation) -> float:
    """Compare the batch and the parameters before and after."""
    x, vectors = data.batch((16, 6, 5)), impl.parameters(6)
    given = [v.copy() for v in (x, *vectors[:2])]
    converted = [impl.convert(v) for v in (x, *vectors)]
    impl.function(*converted, training=True, momentum=0.1, eps=1e-5)
    for name, before, after in zip(("x", "gamma", "beta"), given, converted[:3], strict=True):
        assert np.array_equal(before, as_numpy(after)), f"{name} was changed"
    return 0.0


def same_bits_again(impl: Implementation) -> float:
    """Compare the bits of repeated calls, one after the other and in four threads at once."""
    x, vectors = data.batch((32, 16, 500), mean=3.0), impl.parameters(16)

    def call(_: int = 0) -> Array:
        return impl.forward(x, vectors)[0].copy()

    first = call()
    for _ in range(4):
        assert np.array_equal(first, call()), "y has other bits in another call"
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(call, range(8)):
            assert np.array_equal(first, y), "y has other bits where four threads call at once"
    return 0.0


def same_bits_with_threads(impl: Implementation) -> float:
    """Compare the bits with one thread, two and four."""
    x, vectors = data.batch((32, 16, 3000), mean=3.0), impl.parameters(16)
    assert impl.set_threads is not None
    found = []
    try:
        for threads in (1, 2, 4):
            impl.set_threads(threads)
            found.append(impl.forward(x, vectors)[0].copy())
    finally:
        impl.set_threads(2)
    assert np.array_equal(found[0], found[1]), "y has other bits with two threads than with one"
    assert np.array_equal(found[0], found[2]), "y has other bits with four threads than with one"
    return 0.0
