"""A group: members in threads, each with its part, get what one process gets from the whole."""

import threading

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data, verdict
from batchnorm.testing.oracle import Problem


class Threads:
    """An all-reduce between threads."""

    def __init__(self, members):
        self.members, self.parts = members, {}
        self.barrier = threading.Barrier(members, timeout=20)

    def all_reduce(self, array):
        self.barrier.wait()
        self.parts[threading.get_ident()] = array
        self.barrier.wait()
        total = sum(self.parts[member] for member in sorted(self.parts))
        self.barrier.wait()
        self.parts.clear()
        return total


def on_each(function, *parts):
    results = [None] * len(parts[0])

    def run(rank):
        results[rank] = function(*(part[rank] for part in parts))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(result is not None for result in results)
    return results


@pytest.mark.parametrize("activation", ["relu", ("leaky_relu", 0.25), "silu"])
@pytest.mark.parametrize("from_y", [False, True])
@pytest.mark.parametrize("sizes", [(10, 10), (12, 0, 3)])
def test_residual_and_activation(sizes, from_y, activation):
    if from_y and activation == "silu":
        pytest.skip("the derivative does not follow from y")
    n, cuts = sum(sizes), np.cumsum(sizes)[:-1]
    x, z, dy = (data.batch((n, 5), mean=m, seed=i) for i, m in enumerate((2.0, 0.0, 0.5)))
    gamma, beta = data.parameters((5,))
    problem = Problem(x, gamma, beta, residual=z, activation=activation)
    dy = np.where(problem.near_a_kink("float32"), np.zeros_like(dy), dy)
    group = Threads(len(sizes))

    def member(x, z, dy):
        named = {"group": group, "activation": activation}
        y, stats = bn.batch_norm(x, gamma, beta, residual=z, **named)
        named |= {"residual": True, "y": y} if from_y else {"residual": z}
        return y, bn.batch_norm_backward(dy, x, stats, gamma, beta, **named)

    results = on_each(member, *(np.split(v, cuts) for v in (x, z, dy)))
    verdict.forward(np.concatenate([y for y, _ in results]), problem, "float32")
    right = problem.backward(dy)
    dx, dz = (np.concatenate([grads[k] for _, grads in results]) for k in (0, 3))
    verdict.dresidual(dz, right, "float32")
    for _, (_, dgamma, dbeta, _) in results:
        verdict.backward((dx, dgamma, dbeta), right, "float32", "float32")


@pytest.mark.parametrize("kind", ["plain", "weights"])
@pytest.mark.parametrize("sizes", [(10, 10), (7, 1, 4), (12, 0, 3), (9,)])
def test_group(sizes, kind):
    n, cuts = sum(sizes), np.cumsum(sizes)[:-1]
    x, dy = data.batch((n, 5), mean=1e4), data.batch((n, 5), mean=0.5, seed=5)
    gamma, beta = data.parameters((5,))
    where = data.weights((n, 5), kind) if kind == "weights" else None
    masks = [None] * len(sizes) if where is None else np.split(where, cuts)
    group = Threads(len(sizes))

    def member(x, dy, where):
        y, stats = bn.batch_norm(x, gamma, beta, where=where, group=group)
        return y, stats, bn.batch_norm_backward(dy, x, stats, gamma, where=where, group=group)

    results = on_each(member, np.split(x, cuts), np.split(dy, cuts), masks)
    expected = Problem(x, gamma, beta, where=where)
    y = np.concatenate([result[0] for result in results])
    dx = np.concatenate([result[2][0] for result in results])
    verdict.forward(y, expected, "float32")
    for _, stats, (_, dgamma, dbeta) in results:
        verdict.moments(stats, expected)
        verdict.backward((dx, dgamma, dbeta), expected.backward(dy), "float32", "float32")
        for mine, first in zip(stats, results[0][1], strict=True):
            np.testing.assert_array_equal(mine, first)  # the same on every member, to the bit


def test_a_size_without_a_rank():
    """It is no more than an attribute: both are needed for one reduction in place of two."""
    x = data.batch((7, 3), mean=3.0)
    group = Threads(2)
    group.size = 2
    found = on_each(lambda part: bn.batch_norm(part, group=group)[0], [x[:4], x[4:]])
    verdict.forward(np.concatenate(found), Problem(x), "float32")


def test_too_few_values_in_the_whole_group():
    group = Threads(2)

    def member(x):
        with pytest.raises(
            ValueError, match="x: got a channel with fewer than 2 values in the whole group"
        ):
            bn.batch_norm(x, group=group)
        return True

    assert on_each(member, [data.batch((1, 3)), data.batch((0, 3))]) == [True, True]


def test_a_group_that_returns_nothing():
    class InPlace:
        def all_reduce(self, array):
            array += 0

    with pytest.raises(
        TypeError, match="group.all_reduce: got a NoneType of shape None, expected the sum"
    ):
        bn.batch_norm(data.batch((4, 3)), group=InPlace())


def test_adapters_can_be_made_again():
    """Importing an engine's adapter leaves the function of its name alone."""
    pytest.importorskip("jax")
    assert [repr(bn.distributed.jax(name)) for name in "ab"] == [
        "<Jax group over the axis 'a'>",
        "<Jax group over the axis 'b'>",
    ]


def test_an_axis_name_that_is_not_bound():
    pytest.importorskip("jax")
    import jax.numpy as jnp

    with pytest.raises(ValueError, match="group: got the axis name 'a', which is not bound here"):
        bn.batch_norm(jnp.zeros((4, 3)), group=bn.distributed.jax("a"))
