"""Hypothesis drives shapes, axes, dtypes, masks and offsets against the oracle."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import batchnorm as bn
from batchnorm.testing import data, verdict
from batchnorm.testing.libraries import targets
from batchnorm.testing.oracle import Problem

DTYPES = ["float16", "bfloat16", "float32", "float64"]
OFFSETS = {"float16": 8.0, "bfloat16": 2.0, "float32": 1e6, "float64": 1e8}
# Eager libraries, which need no compilation for each new shape.
TARGETS = [targets("numpy")[0], *targets("torch")[:1], *targets("array_api_strict")[::3]]


@st.composite
def problems(draw):
    """Numbers and names only: arrays are made from them, so that a failure is short to read."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)))
    kept = draw(st.sets(st.integers(0, len(shape) - 1), max_size=2))
    axis = tuple(sorted(kept)) if len(kept) != 1 or draw(st.booleans()) else next(iter(kept))
    if isinstance(axis, int) and draw(st.booleans()):
        axis -= len(shape)
    dtype = draw(st.sampled_from(DTYPES))
    return {
        "shape": shape,
        "axis": axis,
        "dtype": dtype,
        "mean": draw(st.floats(-1, 1)) * OFFSETS[dtype],
        "seed": draw(st.integers(0, 2**20)),
        "where": draw(st.sampled_from([None, "mask", "weights"])),
        "affine": draw(st.booleans()),
        "eps": draw(st.sampled_from([1e-5, 1e-3, 1.0])),
    }


@pytest.mark.parametrize("target", TARGETS, ids=repr)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_forward_and_backward(target, problem):
    shape, axis, dtype, eps = (problem[name] for name in ("shape", "axis", "dtype", "eps"))
    kept = {a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))}
    reduced = tuple(i for i in range(len(shape)) if i not in kept)
    assume(np.prod([shape[i] for i in reduced]) >= 2)
    strict, device = target.library == "array_api_strict", target.device_name
    assume(
        not strict or (dtype in ("float32", "float64") and (dtype, device) != ("float64", "no_float64"))
    )
    x = data.batch(shape, dtype, problem["mean"], seed=problem["seed"])
    where = data.weights(shape, problem["where"]) if problem["where"] else None
    assume(where is None or np.all(np.sum(where > 0, axis=reduced) >= 2))
    parameters = "float64" if dtype == "float64" else "float32"
    vector = data.channels(shape, axis)
    gamma, beta = data.parameters(vector, parameters) if problem["affine"] else (None, None)
    dy = data.batch(x.shape, dtype, mean=0.5, seed=5)

    def both(x, dy, gamma, beta, where):
        y, stats = bn.batch_norm(x, gamma, beta, axis=axis, eps=eps, where=where)
        grads = bn.batch_norm_backward(dy, x, stats, gamma, axis=axis, eps=eps, where=where)
        return y, stats, grads

    with target.active():
        y, stats, grads = target.call(both, x, dy, gamma, beta, where)
    expected = Problem(x, gamma, beta, axis=axis, eps=eps, where=where)
    verdict.forward(y, expected, dtype)
    verdict.moments(stats, expected)
    verdict.backward(grads, expected.backward(dy), dtype, parameters)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    mean=st.floats(-1e6, 1e6),
    seed=st.integers(0, 2**20),
)
def test_merging_is_associative(sizes, mean, seed):
    """In any grouping: the moments of the whole."""
    assume(sum(sizes) > 0)
    x = data.batch((sum(sizes), 2), "float32", mean, seed=seed)
    parts = [bn.moments(part) for part in np.split(x, np.cumsum(sizes)[:-1])]
    left = parts[0]
    for part in parts[1:]:
        left = bn.Moments.merge(left, part)
    for merged in (left, bn.Moments.merge(*parts)):
        verdict.moments(merged, Problem(x))
