"""Residuals and activations in the CUDA kernels, run on the host, against formulas in more digits."""

import itertools

import cuda_on_host
import ml_dtypes
import numpy as np
import pytest

import batchnorm as bn
from batchnorm.backends.base import Backend
from batchnorm.backends.cuda import launches
from batchnorm.backends.cuda import running as cuda
from batchnorm.epilogue import ACTIVATIONS, KINDS, Activation, Epilogue

pytestmark = pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="no C++ compiler")

# For each dtype its eps, that of its arithmetic, and a mean that leaves x a few digits.
DTYPES = {
    "float16": (2.0**-10, 2.0**-23, 30),
    "bfloat16": (2.0**-7, 2.0**-23, 8),
    "float32": (2.0**-23, 2.0**-23, 1e4),
    "float64": (2.0**-52, 2.0**-52, 1e7),
}
EPS, SLOPE = 1e-3, 0.2


def sigmoid(h):
    return 1 / (1 + np.exp(-h))


# Values and derivatives, written again and for numbers of any size.
VALUES = {
    None: lambda h: h,
    "relu": lambda h: np.maximum(h, 0),
    "relu6": lambda h: np.clip(h, 0, 6),
    "leaky_relu": lambda h: np.maximum(h, SLOPE * h),
    "silu": lambda h: h * sigmoid(h),
}
SLOPES = {
    None: np.ones_like,
    "relu": lambda h: h > 0,
    "relu6": lambda h: (h > 0) & (h < 6),
    "leaky_relu": lambda h: np.where(h > 0, 1, SLOPE),
    "silu": lambda h: sigmoid(h) + h * sigmoid(h) * sigmoid(-h),
}


class Oracle:
    """Both passes in long double, by the batch's statistics or by given ones."""

    def __init__(self, x, gamma, beta, axis, z, name, where=None, given=None):
        def vector(v):
            return np.expand_dims(v.astype(np.longdouble), self.reduced)

        x = x.astype(np.longdouble)
        self.name, self.frozen = name, given is not None
        self.reduced = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
        self.w = np.broadcast_to(np.ones(()) if where is None else where, x.shape).astype(np.longdouble)
        self.n = self.sum(self.w)
        if given is None:
            d = x - self.sum(self.w * x) / self.n
            d = d - self.sum(self.w * d) / self.n  # what the digits of a large mean leave
            var = self.sum(self.w * d**2) / self.n
        else:
            mean, var = (vector(v) for v in given)
            d = x - mean
        self.scale = vector(gamma) / np.sqrt(var + EPS)
        self.x_hat = d / np.sqrt(var + EPS)
        z = 0 if z is None else z.astype(np.longdouble)
        self.h = vector(gamma) * self.x_hat + vector(beta) + z
        self.y = VALUES[name](self.h)
        self.h_size = 1 + abs(vector(gamma) * self.x_hat) + abs(vector(beta)) + abs(z)

    def sum(self, v):
        return v.sum(self.reduced, keepdims=True)

    def smooth(self, dy, eps):
        """Return dy without what flows where the derivative jumps: there h may be rounded either way."""
        if self.name in (None, "silu"):
            return dy
        jump = np.minimum(abs(self.h), abs(self.h - 6) if self.name == "relu6" else np.inf)
        return np.where(jump < 16 * eps * self.h_size, np.zeros((), dy.dtype), dy)

    def backward(self, dy):
        """Return dx, dgamma, dbeta and dresidual, and the sizes of what each is made of."""
        size = abs(dy.astype(np.longdouble)) * self.h_size
        g = SLOPES[self.name](self.h) * dy.astype(np.longdouble)
        dgamma, dbeta = self.sum(g * self.x_hat), self.sum(g)
        through = 0 if self.frozen else self.w / self.n * (dbeta + self.x_hat * dgamma)
        dx_size = abs(self.scale).max() * size.max()
        sums = self.sum(size * (1 + abs(self.x_hat))).ravel()
        return [
            (self.scale * (g - through), dx_size),
            (dgamma.ravel(), sums),
            (dbeta.ravel(), sums),
            (g, size),
        ]


def assert_near(actual, expected, size, dtype):
    """Half a unit of its dtype, if that is coarser than the arithmetic, and eps of the terms' size."""
    eps, arithmetic, _ = DTYPES[dtype]
    assert actual.dtype.name == dtype
    bound = 16 * arithmetic * size
    if eps > arithmetic:
        bound = bound + 0.5001 * eps * abs(expected) + 2.0**-24
    error = abs(actual.astype(np.longdouble) - expected)
    assert error.shape == actual.shape
    assert np.all(error <= bound), f"{float((error / bound).max()):.3g} of the bound"


# How arrays lie in memory.
LAYOUTS = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "last": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1),
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
}
SHAPES = [(4, 8, 6, 8), (9, 5, 7), (70, 12), (3, 4, 64), (2, 3, 5, 5), (300, 3)]


class Case:
    """Random arrays of one dtype, in random layouts."""

    def __init__(self, dtype, name, seed):
        self.dtype, self.name = dtype, name
        numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        rng = np.random.default_rng([seed, *map(ord, f"{dtype} {name}")])
        shape, self.axis = SHAPES[rng.integers(len(SHAPES))], 1
        ways = list(LAYOUTS.values())

        def array(mean=0.0, std=1.0):
            a = (rng.standard_normal(shape) * std + mean).astype(numpy_dtype)
            return ways[rng.integers(len(ways))](a)

        self.x = array(rng.choice([0.0, DTYPES[dtype][2]]), 2.0)
        self.dy, self.z = array(), array(std=2.0)
        parameters = "float64" if dtype == "float64" else "float32"
        self.parameters = parameters
        sign = rng.choice([-1, 1], shape[1])
        self.gamma = (rng.uniform(0.5, 3, shape[1]) * sign).astype(parameters)
        self.beta = rng.uniform(-1, 3, shape[1]).astype(parameters)
        mask = rng.random((shape[0], *(1,) * (len(shape) - 1))) < 0.7
        mask[:2] = True
        self.where = [None, mask, mask * rng.uniform(0.5, 2, shape)][rng.integers(3)]
        self.limits = list(cuda_on_host.LIMITS.values())[rng.integers(2)]
        self.activation = ("leaky_relu", SLOPE) if name == "leaky_relu" else name

    def check(self, residual, from_y, **context):
        """Run each pass and compare it."""
        z, eps = self.z if residual else None, DTYPES[self.dtype][0]
        given = {"axis": self.axis, "eps": EPS}
        follows = {**given, "activation": self.activation}
        expected = Oracle(self.x, self.gamma, self.beta, self.axis, z, self.name, self.where)
        dy = expected.smooth(self.dy, eps)
        vectors = self.gamma, self.beta
        with cuda_on_host.active(self.limits, **context):
            y, stats = bn.batch_norm(self.x, *vectors, where=self.where, residual=z, **follows)
            back = {"beta": self.beta, "residual": z, **follows}
            if from_y:
                back.update(y=y, residual=residual)
            grads = bn.batch_norm_backward(dy, self.x, stats, self.gamma, where=self.where, **back)
        self.compare(y, grads, dy, expected)

        mean, var = (np.asarray(v, self.parameters) for v in (stats.mean, stats.var))
        expected = Oracle(self.x, *vectors, self.axis, z, self.name, given=(mean, var))
        dy = expected.smooth(self.dy, eps)
        with cuda_on_host.active(self.limits, **context):
            y = bn.normalize(self.x, mean, var, *vectors, residual=z, **follows)
            back.update(y=y) if from_y else None
            grads = bn.normalize_backward(dy, self.x, mean, var, self.gamma, **back)
        self.compare(y, grads[: 4 if residual else 3], dy, expected)

    def compare(self, y, grads, dy, expected):
        assert_near(y, expected.y, expected.h_size, self.dtype)
        dtypes = self.dtype, self.parameters, self.parameters, self.dtype
        for found, (wanted, size), dtype in zip(grads, expected.backward(dy), dtypes, strict=False):
            assert_near(found, wanted, size, dtype)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", launches.TYPES)
def test_passes(dtype, name):
    """With a residual and without; the derivative found from x (and z), and where it can be from y."""
    for seed in range(6):
        for residual, from_y in itertools.product((False, True), (False, True)):
            if not from_y or (name and not ACTIVATIONS[name].curvature):
                case = Case(dtype, name, 4 * seed + 2 * residual + from_y)
                case.check(residual, from_y)


def test_the_kernels_are_what_ran(monkeypatch):
    """Nothing fell to the base class, and each pass is as few launches as without an epilogue."""
    ran = []
    original = cuda_on_host.device

    def device(*args):
        made = original(*args)
        return made._replace(launch=lambda name, *rest: (ran.append(name), made.launch(name, *rest))[1])

    monkeypatch.setattr(cuda_on_host, "device", device)
    for name in ("activation_gradient", "through_epilogue"):
        monkeypatch.setattr(Backend, name, None)
    x = np.random.default_rng(0).standard_normal((6, 4, 8), np.float32)
    with cuda_on_host.active():
        y, stats = bn.batch_norm(x, residual=x, activation="relu")
        bn.batch_norm_backward(x, x, stats, residual=x, activation="relu")
        bn.batch_norm_backward(x, x, stats, residual=True, activation="relu", y=y)
        bn.normalize(x, stats.mean, stats.var, activation="silu")
    assert [name.partition("<")[0] for name in ran] == ["forward", "backward", "backward", "normalize"]
    assert all(name.endswith(", true>") for name in ran)


def test_results_without_an_epilogue_are_those_of_identity():
    """To the bit: both are the same traversal."""
    x, dy = np.random.default_rng(0).standard_normal((2, 6, 5, 40), np.float32)
    leaky = ("leaky_relu", 1.0)
    with cuda_on_host.active():
        y, stats = bn.batch_norm(x)
        same, _ = bn.batch_norm(x, activation=leaky)
        np.testing.assert_array_equal(y, same)
        grads = bn.batch_norm_backward(dy, x, stats)
        found = bn.batch_norm_backward(dy, x, stats, activation=leaky, residual=x)
    for a, b in zip((*grads, dy), found, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", launches.TYPES)
def test_the_gradient_of_an_activation_alone(dtype):
    """For given statistics and groups it is of float32 at least, or of the wider of two dtypes."""
    case = Case(dtype, "silu", 3)
    layout = bn.validation.validate_input(case.x, case.axis)
    mean, var = case.x.astype(float).mean(), case.x.astype(float).var()
    m = np.full(layout.broadcast, mean, layout.compute)
    a = np.full(layout.broadcast, 1 / np.sqrt(var), layout.compute)
    epilogue = Epilogue(Activation("silu"), case.z)
    with cuda_on_host.active() as backend:
        g = backend.activation_gradient(case.dy, case.x, m, a, np.zeros_like(m), epilogue, layout)
        mixed = backend.activation_gradient(
            case.dy.astype(np.float64), case.x, m, a, np.zeros_like(m), epilogue, layout
        )
    h = a.astype(np.longdouble) * (case.x.astype(np.longdouble) - m) + case.z.astype(np.longdouble)
    expected = SLOPES["silu"](h) * case.dy.astype(np.longdouble)
    size = (1 + abs(h)) * abs(expected) + abs(case.dy.astype(np.longdouble)) * (1 + abs(h))
    assert_near(g, expected, size, np.dtype(layout.compute).name)
    assert mixed.dtype == np.float64


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_elements_of_zero_weight_may_be_anything(name, bad):
    """Where they have no gradient; and at a masked -inf that a ReLU stops, the gradient may be any."""
    x, dy = np.random.default_rng(0).standard_normal((2, 20, 3, 4), np.float32)
    mask = np.ones(x.shape, bool)
    mask[::5] = False
    x[::5] = bad
    stopped = bad == -np.inf and name in ("relu", "relu6")
    dy[::5] = 1 if stopped else 0
    gamma = np.ones(3, np.float32)
    expected = Oracle(np.where(mask, x, 0), gamma, 0 * gamma, 1, None, name, mask)
    with cuda_on_host.active(), np.errstate(invalid="ignore"):
        _, stats = bn.batch_norm(x, gamma, where=mask, activation=name, eps=EPS)
        grads = bn.batch_norm_backward(
            dy, x, stats, gamma, where=mask, activation=name, eps=EPS, residual=np.zeros_like(x)
        )
    if name != "leaky_relu":  # whose slope is another
        wanted = expected.backward(np.where(mask, dy, 0))
        for found, (right, size) in zip(grads, wanted, strict=True):
            assert_near(found, right, size, "float32")
    assert all(np.all(np.isfinite(v)) for v in grads)


def test_empty_arrays():
    x, one = np.zeros((0, 3), np.float32), np.ones(3, np.float32)
    stats = bn.Moments(0 * one, 0 * one, one)
    with cuda_on_host.active():
        assert bn.normalize(x, 0 * one, one, residual=x, activation="silu").shape == (0, 3)
        for settings in ({}, {"residual": x, "activation": "relu"}):
            dx, dgamma, dbeta, *rest = bn.batch_norm_backward(x, x, stats, **settings)
            assert dx.shape == (0, 3)
            np.testing.assert_array_equal([dgamma, dbeta], np.zeros((2, 3)))
            assert [v.shape for v in rest] == [(0, 3)] * bool(settings)


@pytest.mark.parametrize("target", ["z", "dy"])
def test_results_in_the_place_of_what_was_read(target):
    case = Case("float32", "relu", 5)
    fresh, used = (np.ascontiguousarray(v) for v in (case.z, case.dy))
    x = np.ascontiguousarray(case.x)
    with cuda_on_host.active():
        y, stats = bn.batch_norm(x, residual=fresh, activation="relu")
        grads = bn.batch_norm_backward(used, x, stats, residual=fresh, activation="relu")
        if target == "z":
            out = fresh.copy()
            again, _ = bn.batch_norm(x, residual=out, activation="relu", out=out)
            assert again is out
            np.testing.assert_array_equal(out, y)
        else:
            settings = {"residual": fresh, "activation": "relu", "out": used}
            found = bn.batch_norm_backward(used, x, stats, **settings)
            assert found[0] is used
            for a, b in zip(found, grads, strict=True):
                np.testing.assert_array_equal(a, b)


# Faults by name: the right text, and a wrong one in its place.
FAULTS = {
    "no barrier after the factors of h": (
        "shared.factors[H][local]);\n            }\n            __syncthreads();",
        "shared.factors[H][local]);\n            }",
    ),
    "the neighbour's b": ("f[ch][H] = shared.factors[H][tile.bundle * CH + ch]",
                          "f[ch][H] = shared.factors[H][tile.bundle * CH]"),
    "y added to h": ("params.phases & FROM_Y ? z : h + z", "h + z"),
    "g of the first vector": ("store_streaming<T, V>(params.dresidual, offset[k], dy[k])",
                              "store_streaming<T, V>(params.dresidual, offset[k], dy[0])"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    right, wrong = FAULTS[fault]
    assert cuda.source().count(right) == 1, "the text to break is there once"
    source = cuda.source().replace(right, wrong)
    with pytest.raises(AssertionError):
        check_often(source)


def check_often(source):
    for seed in range(40):
        Case("float32", "relu", seed).check(True, seed % 2 == 1, source=source)


def test_a_residual_does_not_change_the_statistics():
    x = np.random.default_rng(0).standard_normal((16, 6, 120), np.float32)
    with cuda_on_host.active():
        _, stats = bn.batch_norm(x)
        _, same = bn.batch_norm(x, residual=x, activation="silu")
    for a, b in zip(stats, same, strict=True):
        np.testing.assert_array_equal(a, b)
