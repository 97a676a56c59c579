"""Moments of the channels: merging, and updates of running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from batchnorm import optimistic
from batchnorm.arguments import validate_number
from batchnorm.layout import definite, two_parts
from batchnorm.validation import validate_input, validate_parts, validate_stats, validate_vectors

Array = Any


class Moments(NamedTuple):
    r"""Count, mean and population variance of each channel.

    `merge` returns the moments of the union of two sets of values; moments of count 0 are its identity.
    The class is a named tuple, which can be unpacked and passed through `jax.jit`.

    Parameters
    ----------
    count : array or number
        The number of values in each channel, or the sum of their weights.
    mean : array
        The mean, rounded to the dtype of the statistics.
    var : array
        The population variance (divided by `count`, not by `count - 1`).
    mean_lo : array, optional
        The rounding error of `mean`: the mean is `mean + mean_lo`, to about twice the digits of the
        dtype. It keeps results exact for float64 data with a mean of 1e8, and for float32 data in a
        library without float64. The default is zero.

    Notes
    -----
    Vectors have the shape of gamma. Their dtype is float64 if the device has it, otherwise float32.
    """

    count: Array
    mean: Array
    var: Array
    mean_lo: Array | None = None

    @staticmethod
    def merge(*parts: Moments) -> Moments:
        r"""Return the moments of the union of disjoint sets of values.

        .. math::
            n = \sum_i n_i, \qquad \mu = \sum_i \tfrac{n_i}{n} \mu_i, \qquad
            \sigma^2 = \sum_i \tfrac{n_i}{n} \left(\sigma_i^2 + (\mu_i - \mu)^2\right)

        Parameters
        ----------
        *parts : Moments
            At least one, all in the same library, on the same device and of the same shape.

        Returns
        -------
        Moments
            The moments in the widest dtype of the parts, at least float32.

        Raises
        ------
        TypeError
            An argument is not a `Moments`, or arrays are of different libraries.
        ValueError
            There are no arguments, or shapes or devices differ.

        References
        ----------
        Chan, Golub, LeVeque (1983), Algorithms for computing the sample variance, eq. 2.1, generalized
        to any number of parts and to a mean of two terms.
        """
        if not parts:
            raise ValueError("parts: got nothing to merge, expected at least one Moments")
        xp = validate_parts(parts)
        widest = xp.result_type(xp.float32, *(v.dtype for p in parts for v in (p.mean, p.var)))
        dtype = xp.float64 if widest == xp.float64 else xp.float32

        zero = xp.zeros_like(xp.astype(parts[0].mean, dtype))

        def vector(v: Array | float | None) -> Array:
            """Return a field as a vector; a count may be one number for all channels."""
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
        The moments of the batch.
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
        New arrays in the dtypes of the arguments. A channel with a count of 0 is unchanged.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`; or a number is out of range.
    """
    done = optimistic.for_array(mean).update_running(mean, var, stats, momentum, correction, False)
    if done is not None:
        return done  # type: ignore[no-any-return]
    layout = validate_input(mean, tuple(range(getattr(mean, "ndim", 0))), "mean")
    validate_vectors(layout, var=var)
    validate_stats(layout, stats)
    momentum = validate_number("momentum", momentum, 0, 1)
    correction = validate_number("correction", correction, 0)
    xp = layout.xp
    n, batch_mean, batch_var = (layout.vector(v) for v in stats[:3])  # (C)
    freedom = xp.where(n > correction, n - correction, n)  # (C), degrees of freedom
    freedom = xp.where(freedom > 0, freedom, xp.ones_like(freedom))
    m = xp.astype(momentum, layout.wide) if hasattr(momentum, "dtype") else momentum
    m = xp.where(n > 0, xp.ones_like(n) * m, xp.zeros_like(n))  # (C)

    def updated(old: Array, new: Array) -> Array:
        return xp.astype((1 - m) * layout.vector(old) + m * new, old.dtype, copy=False)

    return updated(mean, batch_mean), updated(var, batch_var * (n / freedom))


def merge_vectors(
    parts: list[Moments], reduce: Callable[..., list[Array]] = lambda *sums: list(sums)
) -> Moments:
    """Merge moments whose fields are all vectors of one dtype.

    The parts are summed twice. The first sums give the mean up to its rounding error; the second sums
    give that error, and the variance. For the members of a group, `reduce` sums over all members.
    """
    xp = array_namespace(parts[0].mean)
    n, weighted = reduce(
        _tree_sum([p.count for p in parts]), _tree_sum([p.count * p.mean for p in parts])
    )
    nonzero = xp.where(n > 0, n, xp.ones_like(n))  # avoids 0 / 0
    pivot = definite(xp, weighted / nonzero)
    shifts = [(p.mean - pivot) + p.mean_lo for p in parts]
    lo, square = reduce(
        _tree_sum([p.count * d for p, d in zip(parts, shifts, strict=True)]),
        _tree_sum([p.count * (p.var + d * d) for p, d in zip(parts, shifts, strict=True)]),
    )
    lo = lo / nonzero
    # Negative only by rounding, because the pivot is within a few units in the last place of the mean.
    var = xp.maximum(square / nonzero - lo * lo, xp.zeros_like(lo))
    mean, mean_lo = two_parts(xp, pivot, lo)
    return Moments(n, mean, var, mean_lo)


def merge_rows(rows: Moments) -> Moments:
    """Merge moments that are stacked along the first axis, pairwise in a tree."""
    fields: list[Array] = list(rows)
    xp = array_namespace(rows.mean)
    while (count := fields[0].shape[0]) > 1:
        half = count // 2
        halves = slice(half), slice(half, 2 * half)
        merged = list(merge_vectors([Moments(*(v[part, ...] for v in fields)) for part in halves]))
        if count % 2:
            merged = [xp.concat((v, old[-1:, ...])) for v, old in zip(merged, fields, strict=True)]
        fields = merged
    return Moments(*(v[0, ...] for v in fields))


def _tree_sum(terms: list[Array]) -> Array:
    """Sum pairwise: the error grows with the logarithm of the number of terms."""
    if len(terms) == 1:
        return terms[0]
    half = len(terms) // 2
    return _tree_sum(terms[:half]) + _tree_sum(terms[half:])
