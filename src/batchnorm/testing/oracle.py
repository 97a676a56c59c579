"""Batch norm as the paper writes it, in NumPy and in more digits than what it judges.

Nothing here comes from the rest of the package. Data is lifted to arrays of `decimal.Decimal` with 50
digits, for which NumPy's operators work as well: slow, portable, and exact for this purpose. Float32
and narrower data that is large, or not finite, is lifted to float64 instead.
"""

from __future__ import annotations

import contextlib
import decimal
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

Array = Any

DIGITS = 50


@contextlib.contextmanager
def precise() -> Iterator[None]:
    """Compute with decimals of 50 digits: a context, and with ``@precise()`` a decorator.

    The caller's own decimal context is restored at the end.
    """
    with decimal.localcontext(decimal.Context(prec=DIGITS)):
        yield


def lift(a: Array) -> Array:
    """Bring an array to more digits than it came in."""
    a = np.asarray(a)
    if a.dtype in (object, np.float64) or (
        a.size <= 30_000 and np.all(np.isfinite(a.astype(np.float32)))
    ):
        return decimals(a)
    return a.astype(np.float64)


def decimals(a: Array) -> Array:
    """An array of decimals, each exactly the number that it was."""
    if a.dtype == object:
        return a.copy()
    flat = np.empty(a.size, dtype=object)
    flat[:] = [decimal.Decimal(v) for v in a.astype(np.float64).ravel().tolist()]
    return flat.reshape(a.shape)


def _as(a: Array, like: Array) -> Array:
    """Lift a parameter to the kind of numbers that the data has."""
    a = np.asarray(a)
    return decimals(a) if like.dtype == object else a.astype(np.float64)


def _sigmoid(h: Array) -> Array:
    decay = -abs(h)
    e = np.vectorize(lambda v: v.exp(), otypes=[object])(decay) if h.dtype == object else np.exp(decay)
    return np.where(h < 0, e, 1 + 0 * e) / (1 + e)


class Problem:
    """One batch to normalize, and every quantity of it that a test may want to compare."""

    @precise()
    def __init__(
        self,
        x: Array,
        gamma: Array | None = None,
        beta: Array | None = None,
        *,
        axis: int | tuple[int, ...] = 1,
        eps: float = 1e-5,
        where: Array | None = None,
        mean: Array | None = None,
        var: Array | None = None,
        residual: Array | None = None,
        activation: str | tuple[str, float] | None = None,
    ) -> None:
        x = lift(x)
        kept = tuple(a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,)))
        self.reduced = tuple(i for i in range(x.ndim) if i not in kept)
        self.channels = tuple(x.shape[i] for i in kept)
        self.vector = tuple(n if i in kept else 1 for i, n in enumerate(x.shape))

        one = _as(np.ones(()), x)[()]
        w = np.ones(x.shape, dtype=bool) if where is None else np.asarray(where)
        w = _as(np.broadcast_to(w, x.shape).astype(np.float64), x)
        self.x = np.where(w > 0, x, 0 * one) if where is not None else x
        self.w = w
        self.n = self._sum(w)
        with np.errstate(invalid="ignore"):
            self.mean = self._sum(w * self.x) / self.n if mean is None else self._vector(mean)
            d = self.x - self.mean
            self.var = self._sum(w * d * d) / self.n if var is None else self._vector(var)
        self.d = x - self.mean
        self.given = mean is not None
        self.std = np.sqrt(self.var + _as(np.asarray(eps), x))
        self.x_hat = self.d / self.std
        self.gamma = self._vector(np.ones(self.channels) if gamma is None else gamma)
        self.beta = self._vector(np.zeros(self.channels) if beta is None else beta)
        self.added = residual is not None
        self.h = self.gamma * self.x_hat + self.beta
        terms = abs(self.gamma * self.x_hat) + abs(self.beta)
        if self.added:
            z = _as(residual, x)
            self.h, terms = self.h + z, terms + abs(z)
        self.size = np.maximum(one, terms)
        name, slope = activation if isinstance(activation, tuple) else (activation, 0.01)
        self.activation, self.slope = name, _as(np.asarray(slope), x)[()]
        self.y = self._activated(self.h)

    def _activated(self, h: Array) -> Array:
        match self.activation:
            case None:
                return h
            case "relu":
                return np.where(h > 0, h, 0 * h)
            case "relu6":
                return np.minimum(np.where(h > 0, h, 0 * h), 6 + 0 * h)
            case "leaky_relu":
                return np.where(h > 0, h, self.slope * h)
            case "silu":
                return h * _sigmoid(h)
        raise ValueError(self.activation)

    def _slope_at(self, h: Array) -> Array:
        one, zero = 1 + 0 * h, 0 * h
        match self.activation:
            case None:
                return one
            case "relu":
                return np.where(h > 0, one, zero)
            case "relu6":
                return np.where((h > 0) & (h < 6), one, zero)
            case "leaky_relu":
                return np.where(h > 0, one, self.slope * one)
            case "silu":
                s = _sigmoid(h)
                return s + h * s * (1 - s)
        raise ValueError(self.activation)

    @precise()
    def near_a_kink(self, dtype: str) -> Array:
        """Return where rounding errors decide which derivative an activation has."""
        kinks = {"relu": (0,), "relu6": (0, 6), "leaky_relu": (0,)}.get(self.activation or "", ())
        units = 64 * (2.0**-52 if dtype == "float64" else 2.0**-23)
        near = np.zeros(self.h.shape, dtype=bool)
        for kink in kinks:
            near |= np.asarray(
                abs(self.h - kink) <= self.size * _as(np.asarray(units), self.x)[()], bool
            )
        return near

    @precise()
    def backward(self, dy: Array, y: Array | None = None) -> Gradients:
        """The chain rule, step by step (Ioffe & Szegedy 2015, section 3), with weights.

        Where y is given, it says which of its derivatives an activation has.
        """
        dy = _as(dy, self.x)
        reach = abs(dy)
        if self.activation == "silu":  # whose derivative is not exact
            reach = np.where(dy == 0, reach, reach * self.size)
        with np.errstate(invalid="ignore"):
            if self.activation is not None:
                slope = self._slope_at(self.h if y is None else _as(y, self.x))
                dy = np.where(dy == 0, 0 * dy, dy * slope)
            through = np.where(dy == 0, 0 * dy, dy * self.x_hat)  # NaN where nothing flows is nothing
            d_x_hat = dy * self.gamma
            d_var = -self._sum(through * self.gamma) / (2 * self.std * self.std)
            d_mean = -self._sum(d_x_hat) / self.std
            direct = d_x_hat / self.std
            dx = direct
            if not self.given:
                indirect = d_var * 2 * self.d * self.w / self.n + d_mean * self.w / self.n
                dx = direct + np.where(self.w > 0, indirect, 0 * self.w)
            weight = np.where(reach == 0, reach, reach * abs(self.x_hat))
        scale = abs(self.gamma) / self.std
        return Gradients(
            dx=dx,
            dgamma=self.flat(self._sum(through)),
            dbeta=self.flat(self._sum(dy)),
            dmean=self.flat(d_mean),
            dvar=self.flat(d_var),
            dx_size=np.broadcast_to(np.max(scale) * np.max(reach), dy.shape),
            dgamma_size=self.flat(self._sum(weight)),
            dbeta_size=self.flat(self._sum(reach)),
            dmean_size=self.flat(self._sum(reach * abs(self.gamma)) / self.std),
            dvar_size=self.flat(self._sum(weight * abs(self.gamma)) / (2 * self.std * self.std)),
            dresidual=dy if self.added else None,  # of large arrays, what is kept counts
            dresidual_size=reach if self.added else None,
        )

    def flat(self, v: Array) -> Array:
        """Bring a vector to the shape of gamma."""
        return np.reshape(v, self.channels)

    def _sum(self, v: Array) -> Array:
        return np.sum(v, axis=self.reduced, keepdims=True)

    def _vector(self, v: Array) -> Array:
        return _as(v, self.x).reshape(self.vector)


class Gradients(NamedTuple):
    """Gradients, and the size of the terms that each is a sum of."""

    dx: Array
    dgamma: Array
    dbeta: Array
    dmean: Array
    dvar: Array
    dx_size: Array
    dgamma_size: Array
    dbeta_size: Array
    dmean_size: Array
    dvar_size: Array
    dresidual: Array | None
    dresidual_size: Array | None


def running(
    mean: Array, var: Array, batches: list[Problem], momentum: float | None, correction: float
) -> tuple[Array, Array]:
    """Running statistics after some batches."""
    for k, batch in enumerate(batches, start=1):
        m = 1 / k if momentum is None else momentum
        n, batch_mean, batch_var = (
            batch.flat(v).astype(float) for v in (batch.n, batch.mean, batch.var)
        )
        mean = mean + m * (batch_mean - mean)
        var = var + m * (batch_var * n / (n - correction) - var)
    return mean, var
