"""Count, mean and variance of each channel: joined with others, and followed by running ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from batchnorm.arguments import validate_number
from batchnorm.layout import definite, two_parts
from batchnorm.validation import validate_input, validate_parts, validate_stats, validate_vectors

Array = Any


class Moments(NamedTuple):
    r"""Count, mean and population variance of each channel.

    A monoid: `merge` joins the moments of two sets of values into those of their union, and moments
    of count 0 are its identity. Being a named tuple, it passes through `jax.jit` and unpacks.

    Parameters
    ----------
    count : array or number
        How many values each channel has; the sum of the weights where there were weights.
    mean : array
        The mean, rounded to the dtype of the statistics.
    var : array
        The population variance (divided by `count`, not by `count - 1`).
    mean_lo : array, optional
        What `mean` lost to rounding: the true mean is `mean + mean_lo`, to about twice the digits of
        the dtype. It is what keeps float64 data with a mean of 1e8, and float32 data in a library
        without float64, exact. Left out, it is zero.

    Notes
    -----
    Vectors have the shape of gamma. Their dtype is float64 where the device has it, else float32.
    """

    count: Array
    mean: Array
    var: Array
    mean_lo: Array | None = None

    @staticmethod
    def merge(*parts: Moments) -> Moments:
        r"""Moments of the union of disjoint sets of values.

        .. math::
            n = \sum_i n_i, \qquad \mu = \sum_i \tfrac{n_i}{n} \mu_i, \qquad
            \sigma^2 = \sum_i \tfrac{n_i}{n} \left(\sigma_i^2 + (\mu_i - \mu)^2\right)

        Parameters
        ----------
        *parts : Moments
            At least one; of one library, device and shape.

        Returns
        -------
        Moments
            In the widest dtype of the parts, float32 at least.

        Raises
        ------
        TypeError
            Something else than `Moments` was given, or arrays of different libraries.
        ValueError
            Nothing was given, or shapes or devices differ.

        References
        ----------
        Chan, Golub, LeVeque (1983), Algorithms for computing the sample variance, eq. 2.1, here for
        any number of parts at once and with the mean in two parts.
        """
        if not parts:
            raise ValueError("parts: got nothing to merge, expected at least one Moments")
        xp = validate_parts(parts)
        widest = xp.result_type(xp.float32, *(v.dtype for p in parts for v in (p.mean, p.var)))
        dtype = xp.float64 if widest == xp.float64 else xp.float32

        zero = xp.zeros_like(xp.astype(parts[0].mean, dtype))

        def vector(v: Array | float | None) -> Array:
            """A field as a vector; a count may be one number for all channels."""
            return zero + (xp.astype(v, dtype) if hasattr(v, "dtype") else float(v or 0.0))

        return merge_vectors([Moments(*(vector(v) for v in part)) for part in parts])


def update_running(
    mean: Array,
    var: Array,
    stats: Moments,
    *,
    momentum: float | Array = 0.1,
    correction: float = 1,
) -> tuple[Array, Array]:
    r"""Move running statistics towards those of a batch.

    .. math::
        \mu' = (1 - m) \mu + m \mu_B, \qquad
        \sigma'^2 = (1 - m) \sigma^2 + m \frac{n}{n - \text{correction}} \sigma^2_B

    Parameters
    ----------
    mean, var : array, shape (C,)
        The running mean and variance.
    stats : Moments
        Of the batch.
    momentum : float or 0-d array, default 0.1
        The weight m of the new batch, from 0 to 1; ``1 / k`` at the k-th batch gives the cumulative
        average. (Keras, Flax, Chainer and ONNX call 1 - m the momentum.)
    correction : float, default 1
        Bessel's correction: 1 for the unbiased variance (PyTorch, Chainer), 0 for the population
        variance (Keras, Flax, ONNX). n is the count of `stats`: with weights, their sum. A channel
        whose n is not above `correction` keeps its population variance.

    Returns
    -------
    mean, var : array, shape (C,)
        New arrays, in the dtypes of the old ones. A channel with a count of 0 is unchanged.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`; and numbers out of their range.
    """
    layout = validate_input(mean, tuple(range(getattr(mean, "ndim", 0))), "mean")
    validate_vectors(layout, var=var)
    validate_stats(layout, stats)
    momentum = validate_number("momentum", momentum, 0, 1)
    correction = validate_number("correction", correction, 0)
    xp = layout.xp
    n, batch_mean, batch_var = (layout.vector(v) for v in stats[:3])  # (C)
    free = xp.where(n > correction, n - correction, n)  # (C), degrees of freedom
    free = xp.where(free > 0, free, xp.ones_like(free))
    m = xp.astype(momentum, layout.wide) if hasattr(momentum, "dtype") else momentum
    m = xp.where(n > 0, xp.ones_like(n) * m, xp.zeros_like(n))  # (C)

    def moved(old: Array, new: Array) -> Array:
        return xp.astype((1 - m) * layout.vector(old) + m * new, old.dtype, copy=False)

    return moved(mean, batch_mean), moved(var, batch_var * (n / free))


def merge_vectors(
    parts: list[Moments], reduce: Callable[..., list[Array]] = lambda *sums: list(sums)
) -> Moments:
    """Join moments whose fields are all vectors of one dtype.

    Two rounds of sums over the parts: the first finds a mean, which is off by its own rounding; the
    second gives what it lost, and the variance around it. Between the members of a group, `reduce`
    makes the sums of one member those of all.
    """
    xp = array_namespace(parts[0].mean)
    n, weighted = reduce(
        _tree_sum([p.count for p in parts]), _tree_sum([p.count * p.mean for p in parts])
    )
    nonzero = xp.where(n > 0, n, xp.ones_like(n))  # the union of empty sets is empty
    pivot = definite(xp, weighted / nonzero)
    shifts = [(p.mean - pivot) + p.mean_lo for p in parts]
    lo, square = reduce(
        _tree_sum([p.count * d for p, d in zip(parts, shifts, strict=True)]),
        _tree_sum([p.count * (p.var + d * d) for p, d in zip(parts, shifts, strict=True)]),
    )
    lo = lo / nonzero
    # Never below zero but for rounding: the pivot is within a few units of the mean.
    var = xp.maximum(square / nonzero - lo * lo, xp.zeros_like(lo))
    mean, mean_lo = two_parts(xp, pivot, lo)
    return Moments(n, mean, var, mean_lo)


def merge_rows(rows: Moments) -> Moments:
    """Merge moments that are stacked along a first axis, by halves."""
    fields: list[Array] = list(rows)
    xp = array_namespace(rows.mean)
    while (count := fields[0].shape[0]) > 1:
        half = count // 2
        halves = slice(half), slice(half, 2 * half)
        joined = list(merge_vectors([Moments(*(v[part, ...] for v in fields)) for part in halves]))
        if count % 2:
            joined = [xp.concat((v, old[-1:, ...])) for v, old in zip(joined, fields, strict=True)]
        fields = joined
    return Moments(*(v[0, ...] for v in fields))


def _tree_sum(terms: list[Array]) -> Array:
    """Sum by halves, so that the error grows with the log of the number of terms."""
    if len(terms) == 1:
        return terms[0]
    half = len(terms) // 2
    return _tree_sum(terms[:half]) + _tree_sum(terms[half:])
