"""Groups: degenerate channels and batch renormalization, against one process on the joined batch."""

import numpy as np
import pytest
from test_group import Threads, on_each

import batchnorm as bn
from batchnorm.testing import data

C = 5


def joined(function, sizes, *parts, ranked=False):
    """Run members on parts of arrays; their results, of which y and dx are joined."""
    cuts = np.cumsum(sizes)[:-1]
    group = Threads(len(sizes))

    def member(rank, *own):
        named = _Member(group, rank, len(sizes)) if ranked else group
        return function(named, *own)

    split = [[None] * len(sizes) if v is None else np.split(v, cuts) for v in parts]
    return on_each(member, range(len(sizes)), *split)


class _Member:
    def __init__(self, group, rank, size):
        self.group, self.rank, self.size = group, rank, size

    def all_reduce(self, array):
        return self.group.all_reduce(array)


def masks(n, kind):
    """Channel 0 is left out, channel 1 has one value, channel 2 all of its values on one member."""
    if kind == "one value":
        return None
    where = data.weights((n, C), "integers" if kind == "integers" else "mask")
    where = where.astype(np.float32) if kind == "weights" else where
    where[:, :2] = 0
    where[n // 2, 1] = 1
    where[:, 2] = 0
    where[:3, 2] = 1
    if kind == "nothing":
        where[...] = 0
    return where


def same_on_every_member(results, fields):
    for result in results:
        for i in fields:
            for mine, first in zip(result[i], results[0][i], strict=True):
                np.testing.assert_array_equal(mine, first)


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("kind", ["mask", "integers", "weights", "nothing"])
@pytest.mark.parametrize("sizes", [(7, 6), (8, 0, 4), (9,)])
def test_shift(sizes, kind, activation, ranked):
    n = sum(sizes)
    x, z, dy = (data.batch((n, C), mean=m, seed=i) for i, m in enumerate((3.0, 0.0, 0.5)))
    gamma, beta = data.parameters((C,))
    where = masks(n, kind)
    x[where == 0] = np.nan
    dy = np.where((where == 0) & (np.arange(C) > 1), np.float32(0), dy)
    named = {"activation": activation, "degenerate": "shift"}

    def member(group, x, z, dy, where):
        y, stats = bn.batch_norm(x, gamma, beta, where=where, residual=z, group=group, **named)
        own = {**named, "where": where, "residual": z, "group": group}
        dx, dgamma, dbeta, dz = bn.batch_norm_backward(dy, x, stats, gamma, beta, **own)
        return (y, dx, dz), stats, (dgamma, dbeta)

    results = joined(member, sizes, x, z, dy, where, ranked=ranked)
    ((y, dx, dz), stats, sums) = member(None, x, z, dy, where)
    same_on_every_member(results, (1, 2))
    kept = (where > 0) | (np.arange(C) < 2) | (kind == "nothing")
    for i, right in enumerate((y, dx, dz)):
        ours = np.concatenate([result[0][i] for result in results])
        np.testing.assert_allclose(ours[kept], right[kept], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(results[0][1].count, stats.count)
    for ours, right in zip(results[0][1][1:3], stats[1:3], strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-6)
    for ours, right in zip(results[0][2], sums, strict=True):
        assert ours.dtype == right.dtype
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5)
    degenerate = range(C) if kind == "nothing" else range(2)
    assert np.all(stats.count[list(degenerate)] == 0)


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("sizes", [(1, 0), (0, 1, 0), (0, 0)])
def test_one_value_or_none_in_the_whole_group(sizes, ranked):
    n = sum(sizes)
    x, z, dy = (data.batch((n, C), seed=i) for i in range(3))
    gamma, beta = data.parameters((C,))
    named = {"activation": "relu", "degenerate": "shift"}

    def member(group, x, z, dy):
        y, stats = bn.batch_norm(x, gamma, beta, residual=z, group=group, **named)
        own = {**named, "residual": z, "group": group}
        return y, stats, bn.batch_norm_backward(dy, x, stats, gamma, beta, **own)

    results = joined(member, sizes, x, z, dy, ranked=ranked)
    h = beta + z
    np.testing.assert_array_equal(np.concatenate([r[0] for r in results]), np.maximum(h, 0))
    expected = np.where(h > 0, dy, 0)
    for _, stats, (dx, dgamma, dbeta, _) in results:
        assert np.all(stats.count == 0)
        assert np.all(dx == 0)
        np.testing.assert_array_equal(dgamma, np.zeros(C, np.float32))
        np.testing.assert_allclose(dbeta, expected.sum(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(np.concatenate([r[2][3] for r in results]), expected)


def test_a_channel_of_one_value_per_member_is_not_degenerate():
    x = data.batch((2, C), mean=3.0)
    found = joined(lambda g, x: bn.batch_norm(x, group=g, degenerate="shift"), (1, 1), x)
    right, _ = bn.batch_norm(x)
    np.testing.assert_allclose(np.concatenate([y for y, _ in found]), right, rtol=1e-4, atol=1e-5)
    assert np.all(found[0][1].count == 2)


def test_layer_in_a_group():
    """Running statistics of degenerate channels stay, on every member."""
    sizes, where = (6, 5), masks(11, "mask")
    x, dy = data.batch((11, C), mean=3.0), data.batch((11, C), seed=5)

    def member(group, x, dy, where):
        layer = bn.BatchNorm(C, degenerate="shift", group=group)
        layer(x, where=where)
        layer.backward(dy)
        return (layer.running_mean, layer.running_var), (layer.gamma_grad, layer.beta_grad)

    results = joined(member, sizes, x, dy, where)
    same_on_every_member(results, (0, 1))
    (mean, var), _ = member(None, x, dy, where)
    np.testing.assert_array_equal(results[0][0][0][:2], 0)
    np.testing.assert_array_equal(results[0][0][1][:2], 1)
    np.testing.assert_allclose(results[0][0], (mean, var), rtol=1e-6)


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("kind", ["plain", "weights"])
@pytest.mark.parametrize("sizes", [(7, 6), (8, 0, 4), (9,)])
def test_renorm(sizes, kind, ranked):
    n = sum(sizes)
    x, z, dy = (data.batch((n, C), mean=m, seed=i) for i, m in enumerate((3.0, 0.0, 0.5)))
    gamma, beta = data.parameters((C,))
    mean, var = data.statistics((C,))
    mean = mean + np.float32(3)
    where = data.weights((n, C), "weights") if kind == "weights" else None
    named = {"activation": "silu", "r_max": 1.5, "d_max": 0.5}

    def member(group, x, z, dy, where):
        own = {**named, "residual": z, "group": group, "where": where}
        y, stats = bn.batch_renorm(x, mean, var, gamma, beta, **own)
        dx, dgamma, dbeta, dz = bn.batch_renorm_backward(dy, x, stats, mean, var, gamma, beta, **own)
        return (y, dx, dz), stats, (dgamma, dbeta), bn.update_renorm(mean, var, stats)

    results = joined(member, sizes, x, z, dy, where, ranked=ranked)
    same_on_every_member(results, (1, 2, 3))
    whole = member(None, x, z, dy, where)
    for i, right in enumerate(whole[0]):
        ours = np.concatenate([result[0][i] for result in results])
        np.testing.assert_allclose(ours, right, rtol=2e-5, atol=1e-5)
    for i in (2, 3):
        for ours, right in zip(results[0][i], whole[i], strict=True):
            np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5)


def test_renorm_of_too_few_values_in_the_whole_group():
    mean, var = data.statistics((C,))

    def member(group, x):
        with pytest.raises(ValueError, match="fewer than 2 values in the whole group"):
            bn.batch_renorm(x, mean, var, group=group)
        return True

    assert all(joined(member, (1, 0), data.batch((1, C))))


class Telling:
    """A group that is told of an error."""

    def __init__(self):
        self.told = []

    def all_reduce(self, array):
        return array

    def abort_unannounced(self, error):
        self.told.append(error)

    abort = abort_unannounced


def test_other_members_are_told_of_an_error():
    x, v = data.batch((6, C)), np.ones(C, np.float32)
    where = masks(6, "mask")
    _, stats = bn.batch_norm(x, where=where, degenerate="shift")
    for wrong in (
        lambda g: bn.batch_norm(x, v[:2], group=g, degenerate="shift"),
        lambda g: bn.batch_norm(x, group=g, degenerate="shift", residual=x[:2]),
        lambda g: bn.batch_norm_backward(x[:2], x, stats, group=g, degenerate="shift"),
        lambda g: bn.batch_norm_backward(x, x, stats, v[:2], group=g, degenerate="shift"),
        lambda g: bn.batch_norm_backward(x, x, None, group=g, degenerate="shift"),
        lambda g: bn.batch_renorm(x, v[:2], v, group=g),
        lambda g: bn.batch_renorm_backward(x[:2], x, stats, v, v, group=g),
        lambda g: bn.batch_renorm_backward(x, x, stats, v, v, r_max=0.5, group=g),
        lambda g: bn.batch_norm(x, where=where, eps=-1, group=g, degenerate="shift"),
        lambda g: bn.batch_norm(x, where=where, activation="tanh", group=g, degenerate="shift"),
    ):
        group = Telling()
        with pytest.raises((TypeError, ValueError)) as caught:
            wrong(group)
        assert group.told == [caught.value]
