"""Layers: renormalization with schedules, virtual batches, and a guard of the running statistics."""

import copy
import importlib.util
import json
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

import batchnorm as bn
from batchnorm import virtual
from batchnorm.testing import data, verdict
from batchnorm.testing.oracle import Problem

X, DY = data.batch((12, 4), mean=3.0), data.batch((12, 4), seed=5)


def grows(batches):
    return 1 + batches


def shrinks(batches):
    return 5 / (1 + batches)


def same(a, b):
    """Check that two states are the same objects."""
    assert a.keys() == b.keys()
    assert all(a[name] is b[name] for name in a)


# Renormalization.


def test_schedules_are_called_with_the_number_of_batches_before():
    called = []

    def r_max(batches):
        called.append(batches)
        return 1 + batches

    layer = bn.BatchNorm(4, renorm=(r_max, None))
    for _ in range(3):
        layer(X)
        layer(X)  # recomputed
        layer.backward(DY)
    assert called == [0, 0, 1, 1, 2, 2]
    layer.eval()(X)
    assert len(called) == 6


def test_schedules_give_the_limits_of_each_batch():
    layer = bn.BatchNorm(4, renorm=(grows, shrinks))
    mean, var = np.zeros(4), np.ones(4)
    for k in range(4):
        x = data.batch((12, 4), mean=3.0, seed=k)
        y = layer(x)
        right, stats = bn.batch_renorm(x, mean, var, r_max=1 + k, d_max=5 / (1 + k))
        np.testing.assert_array_equal(y, right)
        dx = layer.backward(DY)
        named = {"r_max": 1 + k, "d_max": 5 / (1 + k)}
        gamma, beta = np.ones(4, np.float32), np.zeros(4, np.float32)
        grads = bn.batch_renorm_backward(DY, x, stats, mean, var, gamma, beta, **named)
        for ours, theirs in zip((dx, layer.gamma_grad, layer.beta_grad), grads, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        mean, var = bn.update_renorm(mean, var, stats)
        np.testing.assert_array_equal(layer.running_mean, mean)
        np.testing.assert_array_equal(layer.running_var, var)


def test_a_schedule_that_is_out_of_range_changes_nothing():
    layer = bn.BatchNorm(4, renorm=(lambda k: 1 - k, None))
    layer(X)
    layer.backward(DY)
    before = layer.state_dict()
    with pytest.raises(ValueError, match="r_max: got 0, expected a number >= 1"):
        layer(X)
    same(layer.state_dict(), before)
    with pytest.raises(RuntimeError, match="no forward pass"):
        layer.backward(DY)


@pytest.mark.parametrize("again", [lambda v: pickle.loads(pickle.dumps(v)), copy.deepcopy, copy.copy])
def test_pickles_and_copies(again):
    settings = {"renorm": (grows, shrinks), "nonfinite": "skip"}
    layer = bn.BatchNorm(4, **settings)
    layer(X)
    layer.backward(DY)
    other = again(layer)
    assert other.renorm == (grows, shrinks)
    assert other.nonfinite == "skip"
    np.testing.assert_array_equal(other(X), layer(X))
    np.testing.assert_array_equal(other.backward(DY), layer.backward(DY))
    np.testing.assert_array_equal(other.running_var, layer.running_var)
    shifting = again(bn.BatchNorm(4, virtual_batch_size=5, degenerate="shift"))
    assert (shifting.virtual_batch_size, shifting.degenerate) == (5, "shift")


def test_repr():
    text = repr(bn.BatchNorm(4))
    for name in ("degenerate", "renorm", "virtual_batch_size", "nonfinite"):
        assert name not in text
    assert "renorm=(1.5, None)" in repr(bn.BatchNorm(4, renorm=(1.5, None)))
    text = repr(bn.BatchNorm(4, degenerate="shift", virtual_batch_size=3, nonfinite="raise"))
    assert text.endswith("degenerate=shift, virtual_batch_size=3, nonfinite=raise)")


def test_state_round_trip():
    layer, other = bn.BatchNorm(4, renorm=(2, 1)), bn.BatchNorm(4, renorm=(2, 1))
    layer(X)
    layer.backward(DY)
    other.load_state_dict(layer.state_dict())
    np.testing.assert_array_equal(other(X), layer(X))
    np.testing.assert_array_equal(other.eval()(X), layer.eval()(X))


@pytest.mark.parametrize("between", ["update", "another pass", "a loaded state"])
def test_backward_uses_the_running_statistics_of_its_forward_pass(between):
    layer, other = (bn.BatchNorm(4, renorm=(1.5, 1)) for _ in range(2))
    layer(X)
    other(X)
    if between == "update":
        layer.update()
    elif between == "another pass":
        layer.running_mean, layer.running_var = layer.running_mean + 7, layer.running_var * 9
    else:
        layer.renorm = (1, 0)
    np.testing.assert_array_equal(layer.backward(DY), other.backward(DY))
    np.testing.assert_array_equal(layer.gamma_grad, other.gamma_grad)
    with pytest.raises(RuntimeError, match="no forward pass"):
        layer.backward(DY)


def test_gradients_by_differences_with_r_and_d_held():
    """float64, and central differences of the formula with constants r and d."""
    x, dy = data.batch((7, 3), "float64", mean=2.0), data.batch((7, 3), "float64", seed=5)
    gamma, beta = data.parameters((3,), "float64")
    mean, var = (v.astype(float) for v in data.statistics((3,)))
    limits = {"r_max": 1.3, "d_max": 0.8}
    std = np.sqrt(var + 1e-5)
    r = np.clip(np.sqrt(x.var(axis=0) + 1e-5) / std, 1 / 1.3, 1.3)
    d = np.clip((x.mean(axis=0) - mean) / std, -0.8, 0.8)

    def loss(x, gamma, beta):
        x_hat = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
        return np.sum(dy * (gamma * (x_hat * r + d) + beta))

    _, stats = bn.batch_renorm(x, mean, var, gamma, beta, **limits)
    grads = bn.batch_renorm_backward(dy, x, stats, mean, var, gamma, beta, **limits)
    for i, (v, g) in enumerate(zip((x, gamma, beta), grads, strict=True)):
        along = data.batch(v.shape, "float64", seed=20 + i)
        given = [x, gamma, beta]
        values = []
        for sign in (1, -1):
            given[i] = v + sign * 1e-6 * along
            values.append(loss(*given))
        # Differences are right to about the square of the step, and to eps of the loss by the step.
        np.testing.assert_allclose(
            np.sum(g * along), (values[0] - values[1]) / 2e-6, rtol=1e-7, atol=1e-8
        )


KERAS_STEPS = 100
KERAS = """
import json, numpy as np, keras
from batchnorm.testing import data
clipping = {"rmin": 1 / 1.5, "rmax": 1.5, "dmax": 0.7}
layer = keras.layers.BatchNormalization(renorm=True, renorm_clipping=clipping, renorm_momentum=0.9)
for step in range(100):
    x = np.ascontiguousarray(np.moveaxis(data.batch((8, 5, 6), mean=3.0, std=2.0, seed=step), 1, -1))
    y = layer(x, training=True)
values = {w.path.rpartition("/")[2]: np.asarray(w).tolist() for w in layer.weights}
print(json.dumps([np.asarray(y).tolist(), values]))
"""


def test_keras_renormalizes_alike():
    """Its running statistics are float32 over 100 roundings: its y follows them by 1e-5."""
    if importlib.util.find_spec("keras") is None:
        pytest.skip("keras is not installed")
    environment = {"KERAS_BACKEND": "jax", **os.environ}
    command = [sys.executable, "-W", "ignore", "-c", KERAS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if "unexpected keyword" in done.stderr or "Unrecognized keyword" in done.stderr:
        pytest.skip("this Keras has no renorm")
    assert done.returncode == 0, done.stderr[-2000:]
    y, values = json.loads(done.stdout.splitlines()[-1])
    layer = bn.BatchNorm(5, axis=-1, eps=1e-3, momentum=0.1, renorm=(1.5, 0.7))
    for step in range(KERAS_STEPS):
        x = np.moveaxis(data.batch((8, 5, 6), mean=3.0, std=2.0, seed=step), 1, -1)
        ours = layer(x)
        layer.update()
    np.testing.assert_allclose(ours, y, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(layer.running_mean, values["renorm_mean"], rtol=1e-5)
    std = np.sqrt(layer.running_var + 1e-3)
    np.testing.assert_allclose(std, values["renorm_stddev"], rtol=1e-5)


# Virtual batches.


def parts_of(x, size, axis):
    n = x.shape[axis]
    return [np.take(x, range(i, min(n, i + size)), axis=axis) for i in range(0, n, size)]


LAYOUTS = ["C", "F", "permuted", "strided", "reversed", "read-only"]


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("lay", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "axis", "along"),
    [((11, 3, 4), 1, 0), ((11, 4, 3), -1, 0), ((3, 10, 2), 0, 1), ((2, 11, 3, 4), (0, 2), 1)],
)
def test_virtual_batches_in_any_memory(shape, axis, along, lay, each, monkeypatch):
    """Against a call for each part, with every array and `out` in memory as it likes."""
    if each:  # as parts that are large
        monkeypatch.setattr(virtual, "CALL_EACH", 1)
    lay = data.LAYOUTS[lay]
    channels = data.channels(shape, axis)
    x, dy, z = (data.batch(shape, mean=m, seed=i) for i, m in enumerate((2.0, 0.5, 0.1)))
    where = data.weights(shape, "weights") + np.float32(0.25)
    gamma, beta = data.parameters(channels)
    layer = bn.BatchNorm(channels, axis=axis if isinstance(axis, tuple) else (axis,),
                         virtual_batch_size=4, activation="relu")  # fmt: skip
    layer.load_state_dict({**layer.state_dict(), "gamma": gamma, "beta": beta})
    layer.gamma, layer.beta = lay(gamma), lay(beta)
    out, dout = (lay(np.zeros_like(x)).copy(order="K") for _ in range(2))
    y = layer(lay(x), where=lay(where), residual=lay(z), out=out)
    assert y is out
    dx, dz = layer.backward(lay(dy), out=dout)
    assert dx is dout
    dgamma = dbeta = 0
    for i, (a, w, b, g) in enumerate(
        zip(*(parts_of(v, 4, along) for v in (x, where, z, dy)), strict=True)
    ):
        named = {"axis": axis, "where": w, "residual": b, "activation": "relu"}
        right, stats = bn.batch_norm(a, gamma, beta, **named)
        grads = bn.batch_norm_backward(g, a, stats, gamma, beta, **named)
        for ours, theirs in ((y, right), (dx, grads[0]), (dz, grads[3])):
            np.testing.assert_allclose(parts_of(ours, 4, along)[i], theirs, rtol=2e-5, atol=2e-6)
        dgamma, dbeta = dgamma + grads[1], dbeta + grads[2]
    np.testing.assert_allclose(layer.gamma_grad, dgamma, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.beta_grad, dbeta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recorded", [(True, False), (False, True)])
def test_virtual_batches_of_tensors_that_are_recorded_in_one_pass_only(recorded):
    """Whether large parts have a call each may differ between the passes; their statistics do not."""
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(data.batch((8, 4, 64, 64))).requires_grad_()
    dy = torch.from_numpy(data.batch((8, 4, 64, 64), seed=5))
    layer, other = (bn.BatchNorm(4, virtual_batch_size=3) for _ in range(2))
    with torch.set_grad_enabled(recorded[0]):
        layer(x)
    with torch.set_grad_enabled(recorded[1]):
        dx = layer.backward(dy)
    other(x.detach())
    torch.testing.assert_close(dx.detach(), other.backward(dy))
    torch.testing.assert_close(layer.gamma_grad.detach(), other.gamma_grad, rtol=1e-5, atol=1e-3)


def test_virtual_batches_of_broadcast_arrays():
    """With strides of 0: gamma and dy of one number, x of one example each."""
    x = np.broadcast_to(data.batch((12, 1, 3)), (12, 4, 3))
    dy = np.broadcast_to(np.float32(0.5), x.shape)
    layer = bn.BatchNorm(4, virtual_batch_size=5)
    layer(x)
    layer.gamma = np.broadcast_to(np.float32(2), (4,))
    y = layer(x)
    for part in (slice(0, 5), slice(5, 10), slice(10, 12)):
        verdict.forward(y[part], Problem(x[part], np.full(4, 2.0)), "float32")
    dx = layer.backward(dy)
    np.testing.assert_allclose(dx, 0, atol=2e-6)


def test_virtual_batches_check_arrays_whole():
    """What is too long is not cut to fit; nothing is written, and the layer is as it was."""
    x = data.batch((10, 3, 4))
    long, layer = np.ones((12, 3, 4), np.float32), bn.BatchNorm(3, virtual_batch_size=4)
    layer(x)
    layer.update()
    before = layer.state_dict()
    for name, kind, wrong in (
        ("where", ValueError, long),
        ("residual", ValueError, long),
        ("out", ValueError, long.copy()),
        ("where", TypeError, "mask"),
        ("residual", TypeError, "z"),
    ):
        with pytest.raises(kind, match=f"{name}: got"):
            layer(x, **{name: wrong})
    same(layer.state_dict(), before)
    layer(x)
    with pytest.raises(ValueError, match="dy: got shape"):
        layer.backward(long)
    with pytest.raises(ValueError, match="out: got shape"):
        layer.backward(x, out=long)
    layer.backward(x)
    assert layer.num_batches_tracked == 2


def test_virtual_batches_write_all_or_nothing():
    x, layer = data.batch((9, 3)), bn.BatchNorm(3, virtual_batch_size=4)
    out = np.zeros_like(x)
    with pytest.raises(ValueError, match=r"x: got shape \(1, 3\) with one value per channel"):
        layer(x, out=out)
    assert np.all(out == 0)
    memory = np.zeros((12, 3), np.float32)
    with pytest.raises(ValueError, match="out: got memory that it shares with x"):
        layer(memory[:8], out=memory[4:])


def test_virtual_batches_infer_as_others():
    layer, other = bn.BatchNorm(4, virtual_batch_size=5).eval(), bn.BatchNorm(4).eval()
    np.testing.assert_array_equal(layer(X), other(X))


def test_virtual_batches_in_a_group():
    class Alone:
        def all_reduce(self, array):
            return array

    layer = bn.BatchNorm(4, virtual_batch_size=5)
    with pytest.raises(ValueError, match="group: got one beside a virtual_batch_size"):
        layer(X, group=Alone())
    assert layer.num_batches_tracked == 0


# Batches that are not finite.


@pytest.mark.parametrize(
    "special", [{}, {"renorm": (2, 1)}, {"virtual_batch_size": 5}, {"momentum": None}]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_not_finite(value, special):
    x = X.copy()
    x[3, 1] = value

    def trained(nonfinite):
        layer = bn.BatchNorm(4, nonfinite=nonfinite, **special)
        layer(X)
        layer.backward(DY)
        return layer

    with np.errstate(invalid="ignore"):
        layer = trained("propagate")
        layer(x)
        layer.backward(DY)
        assert not np.isfinite(layer.running_mean[1])
        assert np.all(np.isfinite(layer.running_mean[[0, 2, 3]]))
        assert layer.num_batches_tracked == 2

        layer = trained("skip")
        before = layer.state_dict()
        layer(x)
        dx = layer.backward(DY)
        assert not np.all(np.isfinite(dx))
        same(layer.state_dict(), before)
        layer(x)
        layer.update()
        layer.update()
        same(layer.state_dict(), before)
        layer(X)
        layer.backward(DY)
        assert layer.num_batches_tracked == 2
        other = trained("propagate")
        other(X)
        other.update()
        np.testing.assert_array_equal(layer.running_var, other.running_var)

        layer = trained("raise")
        before, grad = layer.state_dict(), layer.gamma_grad
        layer(x)
        dy = DY.copy()
        for step in (lambda: layer.backward(dy, out=dy), layer.update):
            with pytest.raises(ValueError, match="x: got a batch whose .* not finite in channel 1, exp"):
                step()
            same(layer.state_dict(), before)
        assert layer.gamma_grad is grad
        np.testing.assert_array_equal(dy, DY)
        layer(X)
        layer.backward(DY)
        assert layer.num_batches_tracked == 2


def test_many_channels_that_are_not_finite():
    layer = bn.BatchNorm((2, 6), axis=(1, 2), nonfinite="raise")
    x = np.full((4, 2, 6), np.nan, np.float32)
    layer(x)
    with pytest.raises(ValueError, match=r"channel \(0, 0\), \(0, 1\), .*\(1, 1\) and 4 more, exp"):
        layer.update()


def test_nan_that_is_left_out_is_finite():
    x = X.copy()
    x[0] = np.nan
    where = np.ones((12, 1), bool)
    where[0] = False
    layer = bn.BatchNorm(4, nonfinite="raise")
    layer(x, where=where)
    layer.update()
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_that_is_not_finite_under_jit(nonfinite, momentum):
    """Where values cannot be looked at, both leave the batch out; the count stays right."""
    jax = pytest.importorskip("jax")
    bad = X.copy()
    bad[3, 1] = np.nan

    @jax.jit
    def step(state, x):
        layer = bn.BatchNorm(4, nonfinite=nonfinite, momentum=momentum)
        layer.load_state_dict(state)
        layer(x)
        layer.update()
        return layer.state_dict()

    state = bn.BatchNorm(4, xp=jax.numpy).state_dict()
    expected = bn.BatchNorm(4, momentum=momentum)
    for x in (X, bad, X + 1, bad):
        state = step(state, jax.numpy.asarray(x))
        if x is not bad:
            expected(x)
            expected.update()
    assert int(state["num_batches_tracked"]) == 2
    np.testing.assert_allclose(state["running_mean"], expected.running_mean, rtol=1e-5)
    np.testing.assert_allclose(state["running_var"], expected.running_var, rtol=1e-5)


# Wrong settings.


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"renorm": (0.5, 1)}, ValueError, "r_max: got 0.5, expected a number >= 1"),
        ({"renorm": (2, -1)}, ValueError, "d_max: got -1, expected a number >= 0"),
        ({"renorm": (math.nan, 1)}, ValueError, "r_max: got nan"),
        ({"renorm": (2, math.nan)}, ValueError, "d_max: got nan"),
        ({"renorm": (math.inf, 1)}, ValueError, "r_max: got inf"),
        ({"renorm": ("3", 1)}, TypeError, "r_max: got '3'"),
        ({"renorm": (True, 1)}, TypeError, "r_max: got True"),
        ({"renorm": 3}, TypeError, "renorm: got 3, expected None, or a tuple"),
        ({"renorm": True}, TypeError, "renorm: got True"),
        ({"renorm": (3,)}, TypeError, "renorm: got"),
        ({"renorm": (3, 2, 1)}, TypeError, "renorm: got"),
        ({"renorm": [3, 2]}, TypeError, "renorm: got"),
        ({"renorm": "ab"}, TypeError, "renorm: got 'ab'"),
        ({"renorm": (2, 1), "track_running_stats": False}, ValueError, "renorm: got .* without running"),
        ({"renorm": (2, 1), "virtual_batch_size": 3}, ValueError, "renorm: got one beside a virtual"),
        ({"renorm": (2, 1), "degenerate": "shift"}, ValueError, "renorm: got one beside degenerate"),
        (
            {"virtual_batch_size": 0},
            ValueError,
            "virtual_batch_size: got 0, expected a whole",
        ),
        ({"virtual_batch_size": -1}, ValueError, "virtual_batch_size: got -1"),
        ({"virtual_batch_size": 2.5}, TypeError, "virtual_batch_size: got 2.5"),
        ({"virtual_batch_size": True}, ValueError, "virtual_batch_size: got True"),
        ({"virtual_batch_size": "4"}, TypeError, "virtual_batch_size: got '4'"),
        ({"degenerate": "drop"}, ValueError, "degenerate: got 'drop', expected one of 'raise', 'shift'"),
        ({"degenerate": None}, TypeError, "degenerate: got None"),
        ({"nonfinite": "warn"}, ValueError, "nonfinite: got 'warn', expected one of 'propagate'"),
        ({"nonfinite": 1}, TypeError, "nonfinite: got 1"),
    ],
)
def test_wrong_settings(settings, error, text):
    with pytest.raises(error, match=text):
        bn.BatchNorm(4, **settings)


@pytest.mark.parametrize("name", ["degenerate", "virtual_batch_size", "renorm", "nonfinite"])
def test_what_is_assigned_later_is_checked_too(name):
    """A wrong value is an error that changes nothing, at the latest when it is used."""
    layer = bn.BatchNorm(4)
    layer(X)
    layer.update()
    before = layer.state_dict()
    setattr(layer, name, "nonsense")

    def step():
        layer(np.where(X > 4, np.float32(np.nan), X))
        layer.update()

    with pytest.raises((TypeError, ValueError), match=f"{name}: got 'nonsense'"):
        step()
    same(layer.state_dict(), before)


@pytest.mark.parametrize(
    ("named", "error", "text"),
    [
        ({"momentum": 2.0}, ValueError, r"momentum: got 2\.0"),
        ({"momentum": "x"}, TypeError, "momentum: got 'x'"),
        ({"eps": -1}, ValueError, "eps: got -1"),
        ({"eps": math.nan}, ValueError, "eps: got nan"),
    ],
)
def test_wrong_arguments_of_update_renorm(named, error, text):
    mean, var = data.statistics((4,))
    kept = mean.copy(), var.copy()
    with pytest.raises(error, match=text):
        bn.update_renorm(mean, var, bn.moments(X), **named)
    with pytest.raises(TypeError, match="mean: got a str"):
        bn.update_renorm("mean", var, bn.moments(X))
    with pytest.raises(ValueError, match="var: got shape"):
        bn.update_renorm(mean, var[:2], bn.moments(X))
    with pytest.raises(TypeError, match="stats: got a tuple"):
        bn.update_renorm(mean, var, (1, 2))
    np.testing.assert_array_equal(mean, kept[0])
    np.testing.assert_array_equal(var, kept[1])
