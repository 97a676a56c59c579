"""The four kernels on sixteen values: what the traversals in `planes` and `columns` have in common.

Lanes that a count leaves out of `d` are zero, so that they add nothing to a sum.
"""

from __future__ import annotations

from batchnorm.backends.compiled.lanes import as_dtype_of, either, only, streaming_size, wide, within
from batchnorm.backends.compiled.terms import compiled, lanes_at


@compiled
def moments_of(x, i, step, like, w, j, wstep, wlike, count, pivot):
    """v, v·d and v·d² with weights v and d = x - pivot."""
    d = within(count, wide(lanes_at(x, i, step, count, like)) - pivot)
    if wlike is None:
        return d, d, d * d
    v = wide(lanes_at(w, j, wstep, count, wlike))
    d = only(v, d)  # a value without weight may be NaN
    vd = v * d
    return v, vd, vd * d


@compiled
def output_of(x, i, step, like, count, m, a, b):
    """Y = a·(x - m) + b."""
    return a * (lanes_at(x, i, step, count, like) - m) + b


@compiled
def grad_sums_of(dy, h, hstep, x, i, step, like, w, j, wstep, wlike, count, m):
    """Dy and dy·(x - m)."""
    g = wide(lanes_at(dy, h, hstep, count, like))
    d = wide(lanes_at(x, i, step, count, like)) - m
    if wlike is not None:  # a value without weight and without gradient may be NaN
        d = either(lanes_at(w, j, wstep, count, wlike), g, d)
    return g, g * d  # of a lane that is left out dy is zero


@compiled
def grad_input_of(dy, h, hstep, x, i, step, like, w, j, wstep, wlike, count, m, a, b, c):
    """Dx = a·(dy + w·(b·(x - m) + c))."""
    d = b * (lanes_at(x, i, step, count, like) - m) + c
    if wlike is not None:
        v = lanes_at(w, j, wstep, count, wlike)
        d = only(v, as_dtype_of(v, d) * d)
    return a * (lanes_at(dy, h, hstep, count, like) + d)


@compiled
def until_aligned(y, j, size, like):
    """How many values of a run come before the first that streaming stores can begin at."""
    boundary, each = streaming_size(like)
    return min(size, -(y + j * each) % boundary // each)
