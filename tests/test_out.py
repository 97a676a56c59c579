"""`out` that shares memory with an argument: x and dy themselves are fine, all else is an error."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data, verdict
from batchnorm.testing.libraries import targets
from batchnorm.testing.oracle import Problem

TARGETS = [targets("numpy")[1], targets("torch")[1]]


@pytest.fixture(params=TARGETS, ids=repr)
def into(request):
    if request.param.missing():
        pytest.skip(request.param.missing())
    with request.param.active():
        yield request.param.asarray


OVERLAPS = {
    "the next row": (lambda m: m[:-1], lambda m: m[1:]),
    "other strides": (lambda m: m[:6].T, lambda m: m[:6]),
}


@pytest.mark.parametrize("which", OVERLAPS)
def test_another_view_of_x(into, which):
    memory = into(data.batch((7, 6)))
    x, out = (view(memory) for view in OVERLAPS[which])
    before = np.asarray(memory).copy()
    for call in (
        lambda: bn.batch_norm(x, out=out),
        lambda: bn.batch_norm_backward(x, x, bn.moments(x), out=out),
        lambda: bn.normalize(x, x[0], x[0] ** 2, out=out),
        lambda: bn.normalize_backward(x, x, x[0], x[0] ** 2, out=out),
    ):
        with pytest.raises(
            ValueError, match="out: got memory that it shares with (x|dy), expected x or"
        ):
            call()
    np.testing.assert_array_equal(np.asarray(memory), before)


def test_a_vector_in_the_memory_of_out(into):
    x = into(data.batch((7, 6)))
    with pytest.raises(ValueError, match="out: got memory that it shares with gamma"):
        bn.batch_norm(x, x[0], out=x)
    with pytest.raises(ValueError, match=r"out: got memory that it shares with stats\.mean"):
        bn.batch_norm_backward(x, x, bn.moments(x)._replace(mean=x[2]), out=x)
    # Whatever calls of these shapes have passed before.
    y, vectors = into(data.batch((7, 6))), into(data.batch((2, 6)))
    bn.batch_norm(y, *vectors, out=y)
    with pytest.raises(ValueError, match="out: got memory that it shares with gamma"):
        bn.batch_norm(x, x[0], x[1], out=x)
    weights = into(abs(data.batch((7, 6))))
    with pytest.raises(ValueError, match="out: got memory that it shares with where"):
        bn.batch_norm(x, where=weights, out=weights)


def test_an_out_that_overlaps_itself(into):
    x, row = into(data.batch((7, 6))), into(data.batch((1, 6)))
    out = (
        row.expand(7, 6)
        if hasattr(row, "expand")
        else np.lib.stride_tricks.as_strided(row, (7, 6), (0, 4))
    )
    with pytest.raises(
        ValueError, match="out: got values that share memory, expected a place of its own"
    ):
        bn.batch_norm(x, out=out)
    np.testing.assert_array_equal(row, data.batch((1, 6)))


def test_a_layer_that_writes_over_its_input(into):
    """There is nothing to go back from, whichever view of it is given."""
    for out in (lambda x: x, lambda x: x[:]):
        x, layer = into(data.batch((7, 6))), bn.BatchNorm(6)
        layer(x, out=out(x))
        with pytest.raises(RuntimeError, match="backward: got no forward pass to go back from"):
            layer.backward(x)


def test_the_same_view_and_values_between_others(into):
    a = data.batch((7, 6))
    x = into(a.copy())
    y, _ = bn.batch_norm(x, out=x[:])
    verdict.forward(np.asarray(y), Problem(a), "float32")
    memory = into(np.stack([a, 0 * a], -1))
    y, _ = bn.batch_norm(memory[..., 0], out=memory[..., 1])
    verdict.forward(np.asarray(y), Problem(a), "float32")
    np.testing.assert_array_equal(np.asarray(memory[..., 0]), a)
