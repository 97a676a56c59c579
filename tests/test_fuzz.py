"""Random calls against the oracle: a share of what `python tests/fuzz.py` runs by the ten thousands."""

import contextlib

import fuzz
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import batchnorm as bn
from batchnorm.testing import data, verdict
from batchnorm.testing.libraries import targets
from batchnorm.testing.oracle import Problem

TARGETS = [
    target
    for library in ("numpy", "torch", "array_api_strict")
    for target in targets(library)
    if target.device_name in ("native", "numpy", "generic", "CPU_DEVICE") or "cpu" in target.device_name
]
CASES = {"few": range(60), "more": range(60, 300)}


@pytest.mark.parametrize("cases", ["few", pytest.param("more", marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_random_calls(target, cases):
    if target.missing():
        pytest.skip(target.missing())
    for number in CASES[cases]:
        with _named(f"python tests/fuzz.py '{target}' --cases 1 --first {number}"):
            fuzz.run(number, target)


@contextlib.contextmanager
def _named(case):
    try:
        yield
    except Exception as error:
        error.add_note(case)
        raise


def test_the_fuzzer_notices_a_wrong_order(monkeypatch):
    """What it was written for: a per-channel vector read in the order of its memory."""
    from batchnorm.layout import Layout

    right = Layout.vector

    def by_memory(self, v):
        v = np.asarray(v)
        return right(self, np.reshape(v.ravel(order="K"), v.shape))

    monkeypatch.setattr(Layout, "vector", by_memory)
    target, wrong = targets("numpy")[2], 0
    for number in range(0, 210, 7):
        try:
            fuzz.run(number, target)
        except AssertionError:
            wrong += 1
    assert wrong > 0


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
