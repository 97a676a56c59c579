"""The checks of `check_batch_norm`: what a batch norm gets wrong in practice, one function for each.

A check calls an `Implementation` and returns the largest error in units of eps times the size of the
terms, or raises `AssertionError` with a sentence. Data and judgement are NumPy's; the oracle has 50
digits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from batchnorm.testing import data
from batchnorm.testing.libraries import BFLOAT16
from batchnorm.testing.oracle import Problem
from batchnorm.testing.verdict import EPS, worst

Array = Any

FEATURES = {
    "training": "it normalizes by the batch's own statistics",
    "inference": "it normalizes by the running statistics",
    "running": "it returns new running statistics",
    "where": "it takes a mask as the keyword where",
    "axis": "it takes the channel axis as the keyword axis",
    "float16": "it takes float16",
    "bfloat16": "it takes bfloat16",
    "float64": "it takes float64",
    "mixed": "the batch may have another dtype than gamma and beta",
    "large": "25 million values take less than a minute",
}
LIMIT = 16.0
"""Errors of y and of gradients that pass, in eps of the dtype times the size of the terms."""


class Implementation(NamedTuple):
    """A batch norm, as the checks call it: NumPy arrays in and out."""

    function: Callable[..., Any]
    backward: Callable[..., Any] | None
    features: frozenset[str]
    correction: int
    """Bessel's correction of its running variance."""
    convert: Callable[[Array], Array]

    def forward(self, x: Array, vectors: tuple[Array, ...], **settings: Any) -> tuple[Array, ...]:
        """Return y, and the new running mean and variance."""
        settings = {"training": True, "momentum": 0.1, "eps": 1e-5, **settings}
        where = settings.pop("where", None)
        if where is not None:
            settings["where"] = self.convert(where)
        found = self.function(self.convert(x), *map(self.convert, vectors), **settings)
        return tuple(v if v is None else _numpy(v) for v in found)

    def gradients(self, dy: Array, x: Array, vectors: tuple[Array, ...], **settings: Any) -> Any:
        """Return dx, dgamma and dbeta."""
        assert self.backward is not None
        settings = {"eps": 1e-5, **settings}
        given = [self.convert(v) for v in (dy, x, *vectors[:2])]
        return tuple(_numpy(v) for v in self.backward(*given, **settings))


def _numpy(v: Any) -> Array:
    if not isinstance(v, np.ndarray) and hasattr(v, "detach"):
        v = v.detach()
    if str(v.dtype).endswith("bfloat16") and not isinstance(v, np.ndarray) and hasattr(v, "float"):
        return np.asarray(v.float()).astype(BFLOAT16)
    return np.asarray(v)


class Check(NamedTuple):
    """A check, and why it matters."""

    run: Callable[..., float]
    why: str
    source: str
    parameters: tuple[dict[str, Any], ...] = ({},)
    needs: frozenset[str] = frozenset({"training"})
    limit: float = LIMIT


def _vectors(channels: int, dtype: str = "float32") -> tuple[Array, ...]:
    """Return gamma, beta, and running statistics as a new layer has them."""
    gamma, beta = data.parameters((channels,), dtype)
    return gamma, beta, np.zeros(channels, gamma.dtype), np.ones(channels, gamma.dtype)


def _y(impl: Implementation, x: Array, dtype: str, axis: int = 1, **settings: Any) -> float:
    vectors = _vectors(x.shape[axis], "float64" if dtype == "float64" else "float32")
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
    return _y(impl, data.batch((16, 6, 50), mean=mean), "float32")


def y_of_many_values(impl: Implementation) -> float:
    """Judge y of 25 million values with a mean of 100."""
    return _y(impl, data.batch((32, 64, 111, 110), mean=100.0), "float32")


def y_with_channels_last(impl: Implementation, mean: float) -> float:
    """Judge y of channels last."""
    return _y(impl, data.batch((16, 50, 6), mean=mean), "float32", axis=-1)


def y_at_negative_axis(impl: Implementation) -> float:
    """Judge y of an axis counted from the end."""
    return _y(impl, data.batch((5, 4, 3, 6)), "float32", axis=-2)


def y_of_dtype(impl: Implementation, dtype: str) -> float:
    """Judge y of another dtype, with float32 parameters where it has 16 bits."""
    return _y(impl, data.batch((64, 4, 40), dtype, mean=3.0), dtype)


def y_of_large_numbers(impl: Implementation) -> float:
    """Judge y of numbers whose squares float32 does not hold."""
    return _y(impl, data.batch((16, 6, 50), std=1e20), "float32")


def eps_inside_of_the_root(impl: Implementation) -> float:
    """Judge y of a variance that is small beside eps."""
    return _y(impl, data.batch((16, 6, 50), std=1e-2), "float32", eps=1e-2)


def variance_of_the_population(impl: Implementation) -> float:
    """Judge y of two values per channel, where Bessel's correction is a factor of 2."""
    return _y(impl, data.batch((2, 6)), "float32")


def statistics_of_each_channel(impl: Implementation) -> float:
    """Judge y of channels with different means and spreads."""
    x = data.batch((40, 6, 7)) * np.arange(1, 7, dtype=np.float32)[:, None]
    return _y(impl, x + np.arange(6, dtype=np.float32)[:, None] * 10, "float32")


def constant_channel_is_beta(impl: Implementation) -> float:
    """Judge y where all values are equal."""
    x = np.full((50, 3), 0.1, np.float32)
    vectors = _vectors(3)
    y = impl.forward(x, vectors)[0]
    return worst(y, np.broadcast_to(vectors[1], x.shape).astype(float), 1.0, EPS["float32"])


def nan_stays_in_its_channel(impl: Implementation) -> float:
    """Judge the other channels where one has a NaN, which its own has to show."""
    x = data.batch((20, 3, 4))
    x[4, 1, 2] = np.nan
    vectors = _vectors(3)
    y = impl.forward(x, vectors)[0]
    assert np.isnan(y[:, 1]).any(), "the NaN is gone"
    others = x[:, ::2]
    right = Problem(others, *(v[::2] for v in vectors[:2]))
    return worst(y[:, ::2], right.y, right.size, EPS["float32"])


def _or_an_error(call: Callable[[], tuple[Array, ...]]) -> tuple[Array, ...] | None:
    """Return what a call gives; None where it raises, which is as good an answer."""
    try:
        return call()
    except Exception:  # of any framework
        return None


def one_value_per_channel(impl: Implementation) -> float:
    """Expect an error, or numbers: a variance of one value is 0, or not there."""
    found = _or_an_error(lambda: impl.forward(data.batch((1, 3)), _vectors(3)))
    for name, v in zip(("y", "running mean", "running var"), found or (), strict=False):
        assert v is None or np.all(np.isfinite(v)), f"{name} is not finite, and nothing is said"
    return 0.0


def empty_batch(impl: Implementation) -> float:
    """Expect an error, or an empty y and running statistics that are still numbers."""
    found = _or_an_error(lambda: impl.forward(np.zeros((0, 3, 4), np.float32), _vectors(3)))
    if found is not None:
        assert found[0].shape == (0, 3, 4), f"y has the shape {found[0].shape}"
        for name, v in zip(("running mean", "running var"), found[1:], strict=True):
            assert v is None or np.all(np.isfinite(v)), f"{name} is not finite, and nothing is said"
    return 0.0


def inputs_are_unchanged(impl: Implementation) -> float:
    """Compare the batch and the parameters before and after."""
    x, vectors = data.batch((16, 6, 5)), _vectors(6)
    given = [v.copy() for v in (x, *vectors[:2])]
    converted = [impl.convert(v) for v in (x, *vectors)]
    impl.function(*converted, training=True, momentum=0.1, eps=1e-5)
    for name, before, after in zip(("x", "gamma", "beta"), given, converted[:3], strict=True):
        assert np.array_equal(before, _numpy(after)), f"{name} was changed"
    return 0.0


def same_bits_again(impl: Implementation) -> float:
    """Compare the bits of repeated calls."""
    x, vectors = data.batch((32, 16, 500), mean=3.0), _vectors(16)
    first = impl.forward(x, vectors)[0].copy()
    for _ in range(4):
        assert np.array_equal(first, impl.forward(x, vectors)[0]), "y has other bits in another call"
    return 0.0


def _gradient(impl: Implementation, which: int, mean: float, gamma: float | None = None) -> float:
    x, dy = data.batch((16, 6, 50), mean=mean), data.batch((16, 6, 50), mean=0.5, seed=5)
    dy[:4] *= 10  # uneven, so that no sum is small by accident
    vectors = _vectors(6)
    if gamma is not None:
        vectors = (np.full_like(vectors[0], gamma), *vectors[1:])
    found = impl.gradients(dy, x, vectors)[which]
    right = Problem(x, *vectors[:2]).backward(dy)
    name = ("dx", "dgamma", "dbeta")[which]
    size = np.maximum(1e-30, np.asarray(getattr(right, f"{name}_size"), float))
    return worst(found, getattr(right, name), size, EPS["float32"])


def dx(impl: Implementation, mean: float) -> float:
    """Judge the gradient to x, through the mean and the variance."""
    return _gradient(impl, 0, mean)


def dgamma(impl: Implementation, mean: float) -> float:
    """Judge the gradient to gamma."""
    return _gradient(impl, 1, mean)


def dbeta(impl: Implementation, mean: float) -> float:
    """Judge the gradient to beta."""
    return _gradient(impl, 2, mean)


def dgamma_where_gamma_is_0(impl: Implementation) -> float:
    """Judge the gradient to gamma of a channel that is off."""
    return _gradient(impl, 1, 0.0, gamma=0.0)


def _twenty_steps(impl: Implementation, which: int, dtype: str, mean: float) -> float:
    vectors = list(_vectors(4, dtype))
    vectors[2] = vectors[2] + mean
    right = [v.astype(np.longdouble) for v in vectors[2:]]
    for step in range(20):
        x = data.batch((8, 4, 3), dtype, mean=mean, std=2.0, seed=step)
        _, *vectors[2:] = impl.forward(x, tuple(vectors))
        n = x.size // 4
        wide = x.astype(np.longdouble)
        batch = wide.mean((0, 2)), wide.var((0, 2)) * n / (n - impl.correction)
        right = [v + np.longdouble(0.1) * (b - v) for v, b in zip(right, batch, strict=True)]
    size = np.abs(right[which]) + (np.sqrt(right[1]) if which == 0 else 0)
    return worst(vectors[2 + which], right[which].astype(float), size.astype(float), EPS[dtype])


def running_mean(impl: Implementation, mean: float) -> float:
    """Judge the running mean of twenty steps: which momentum is whose."""
    return _twenty_steps(impl, 0, "float32", mean)


def running_variance(impl: Implementation) -> float:
    """Judge the running variance of twenty steps: with Bessel's correction, or without."""
    return _twenty_steps(impl, 1, "float32", 0.0)


def running_mean_of_float64(impl: Implementation) -> float:
    """Judge the running mean of float64 data with a mean of 1e8."""
    return _twenty_steps(impl, 0, "float64", 1e8)


def inference_by_running_statistics(impl: Implementation, mean: float) -> float:
    """Judge y by statistics that are given, which are not the batch's."""
    x, (gamma, beta, _, _) = data.batch((16, 6, 50), mean=mean), _vectors(6)
    running = np.full(6, mean + 0.5, np.float32), np.full(6, 2.0, np.float32)
    y = impl.forward(x, (gamma, beta, *running), training=False)[0]
    right = Problem(x, gamma, beta, mean=running[0], var=running[1])
    return worst(y, right.y, right.size, EPS["float32"])


def inference_updates_nothing(impl: Implementation) -> float:
    """Compare running statistics before and after inference."""
    vectors = _vectors(6)
    _, *after = impl.forward(data.batch((16, 6, 5), mean=3.0), vectors, training=False)
    for v, before in zip(after, vectors[2:], strict=True):
        assert v is None or np.array_equal(v, before), "inference changed a running statistic"
    return 0.0


def masked_y(impl: Implementation) -> float:
    """Judge y where a mask leaves values out of the mean, the variance and their count."""
    return _y(impl, data.batch((8, 3, 6)), "float32", where=_mask())


def masked_nan(impl: Implementation) -> float:
    """Judge y where what is left out is NaN."""
    x, mask = data.batch((8, 3, 6)), _mask()
    x[~np.broadcast_to(mask, x.shape)] = np.nan
    return _y(impl, x, "float32", where=mask)


def masked_running_variance(impl: Implementation) -> float:
    """Judge the running variance under a mask: Bessel's correction counts what is left."""
    x, mask = data.batch((8, 3, 6)), _mask()
    got = impl.forward(x, _vectors(3), where=mask)[2]
    right = Problem(x, where=mask)
    n, var = (right.flat(v).astype(float) for v in (right.n, right.var))
    expected = 0.9 + 0.1 * var * n / (n - impl.correction)
    return worst(got, expected, expected, EPS["float32"])


def _mask() -> Array:
    mask = np.ones((8, 1, 6), bool)
    mask[4:, :, 3:] = False
    return mask


BACKWARD = frozenset({"backward"})
RUNNING = frozenset({"training", "running"})
MEANS = tuple({"mean": mean} for mean in (0.0, 1e2, 1e4, 1e6))
_PAPER = "Ioffe & Szegedy (2015), Algorithm 1"
_CHAN = "Chan, Golub & LeVeque (1983)"

CHECKS: dict[str, Check] = {
    "y_at_mean": Check(
        y_at_mean, "E[x²] − E[x]² loses all digits where the mean is large", _CHAN, MEANS
    ),
    "y_of_many_values": Check(
        y_of_many_values,
        "the error of a sum in one row grows with its length",
        "Higham (1993), The accuracy of floating point summation",
        needs=frozenset({"training", "large"}),
    ),
    "y_with_channels_last": Check(
        y_with_channels_last,
        "memory formats have code of their own",
        _CHAN,
        MEANS,
        frozenset({"training", "axis"}),
    ),
    "y_at_negative_axis": Check(
        y_at_negative_axis,
        "an axis from the end has to be counted before others are reduced",
        "the array API standard, axis",
        needs=frozenset({"training", "axis"}),
    ),
    "y_of_float16": Check(
        y_of_dtype,
        "sums of float16 in float16 overflow at 65,504",
        "Micikevicius et al. (2018), Mixed Precision Training",
        ({"dtype": "float16"},),
        frozenset({"training", "float16"}),
        1.0,
    ),
    "y_of_bfloat16": Check(
        y_of_dtype,
        "bfloat16 has 8 digits: sums in it stop growing at 256 ones",
        "Kalamkar et al. (2019), A Study of BFLOAT16 for Deep Learning Training",
        ({"dtype": "bfloat16"},),
        frozenset({"training", "bfloat16"}),
        1.0,
    ),
    "y_of_float64": Check(
        y_of_dtype,
        "float64 that passes through float32 loses half of its digits",
        "IEEE 754",
        ({"dtype": "float64"},),
        frozenset({"training", "float64"}),
    ),
    "y_of_large_numbers": Check(
        y_of_large_numbers, "squares of numbers over 1.8e19 are infinite in float32", "IEEE 754"
    ),
    "eps_inside_of_the_root": Check(
        eps_inside_of_the_root, "√var + eps is not √(var + eps)", _PAPER
    ),
    "variance_of_the_population": Check(
        variance_of_the_population, "a batch is normalized by n, not by n − 1", _PAPER
    ),
    "statistics_of_each_channel": Check(
        statistics_of_each_channel, "each channel has statistics of its own", _PAPER
    ),
    "constant_channel_is_beta": Check(
        constant_channel_is_beta, "a variance below zero is NaN under a root", _CHAN
    ),
    "nan_stays_in_its_channel": Check(
        nan_stays_in_its_channel, "one bad value must not end a whole layer, nor be hidden", "IEEE 754"
    ),
    "one_value_per_channel": Check(
        one_value_per_channel, "0/0 in Bessel's correction is NaN in the running variance", _PAPER
    ),
    "empty_batch": Check(empty_batch, "the mean of nothing is NaN in the running mean", _PAPER),
    "inputs_are_unchanged": Check(
        inputs_are_unchanged, "a caller's arrays are the caller's", "the array API standard"
    ),
    "same_bits_again": Check(
        same_bits_again, "results that depend on threads cannot be reproduced", "IEEE 754"
    ),
    "dx": Check(
        dx, "the mean and the variance depend on x, too", "Ioffe & Szegedy (2015), section 3",
        ({"mean": 0.0}, {"mean": 1e4}), BACKWARD,
    ),
    "dgamma": Check(
        dgamma, "Σ dy·x − mean·Σ dy cancels where the mean is large", _CHAN,
        ({"mean": 0.0}, {"mean": 1e4}), BACKWARD,
    ),
    "dbeta": Check(
        dbeta, "a sum over all axes but the channels'", "Ioffe & Szegedy (2015), section 3",
        ({"mean": 0.0},), BACKWARD,
    ),
    "dgamma_where_gamma_is_0": Check(
        dgamma_where_gamma_is_0, "x̂ found from (y − beta)/gamma is 0/0", "Goyal et al. (2017), γ = 0",
        needs=BACKWARD,
    ),
    "running_mean": Check(
        running_mean, "momentum weighs the new batch in PyTorch, the old value in Keras", _PAPER,
        ({"mean": 0.0}, {"mean": 1e4}), RUNNING,
    ),
    "running_variance": Check(
        running_variance, "with Bessel's correction or without, but as is said", _PAPER, needs=RUNNING
    ),
    "running_mean_of_float64": Check(
        running_mean_of_float64, "float32 statistics of float64 data are off by 8 at 1e8", "IEEE 754",
        needs=RUNNING | {"float64"},
    ),
    "inference_by_running_statistics": Check(
        inference_by_running_statistics, "scale·x + shift cancels where the mean is large",
        "Ioffe & Szegedy (2015), Algorithm 2", ({"mean": 0.0}, {"mean": 1e4}), frozenset({"inference"}),
    ),
    "inference_updates_nothing": Check(
        inference_updates_nothing, "a test set must not change what is tested",
        "Ioffe & Szegedy (2015), Algorithm 2", needs=frozenset({"inference"}),
    ),
    "masked_y": Check(
        masked_y, "what is left out must not count", _PAPER, needs=frozenset({"training", "where"})
    ),
    "masked_nan": Check(
        masked_nan, "0·NaN is NaN: padding may be anything", "IEEE 754",
        needs=frozenset({"training", "where"}),
    ),
    "masked_running_variance": Check(
        masked_running_variance, "Bessel's correction counts what is left", _PAPER,
        needs=RUNNING | {"where"},
    ),
}  # fmt: skip
