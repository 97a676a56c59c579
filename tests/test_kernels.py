"""The backends: which one runs and why, any strides, any number of threads, bad input."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

import batchnorm as bn
from batchnorm import core
from batchnorm.backends.generic import GENERIC
from batchnorm.testing import data, oracle, verdict
from batchnorm.testing.libraries import kernels
from batchnorm.testing.oracle import Problem

pytest.importorskip("batchnorm._core")
SETS = ("native", "numpy", "generic")


@pytest.fixture(params=SETS)
def chosen(request):
    with kernels(request.param):
        yield request.param


def float64_oracle(x, gamma, beta, axes, where=None, eps=1e-5):
    """y, moments and the pieces of a gradient, in float64 by the formula."""
    x = x.astype(np.float64)
    w = np.ones(x.shape) if where is None else np.broadcast_to(where, x.shape).astype(np.float64)
    n = w.sum(axes, keepdims=True)
    mean = (w * np.where(w > 0, x, 0)).sum(axes, keepdims=True) / n
    var = (w * np.where(w > 0, x - mean, 0) ** 2).sum(axes, keepdims=True) / n
    return (
        gamma.reshape(n.shape) * (x - mean) / np.sqrt(var + eps) + beta.reshape(n.shape),
        mean,
        var,
        w,
        n,
    )


def strided(shape, step, order, reverse):
    """An array whose axes lie in some order, some steps apart, perhaps backwards."""
    rng = np.random.default_rng(sum(shape))
    whole = [n * step for n in shape]
    x = rng.standard_normal([whole[i] for i in order]).astype(np.float32) + 3
    x = x.transpose(np.argsort(order))[(slice(None, None, step),) * len(shape)]
    return x[(slice(None, None, -1),) * len(shape)] if reverse else x


@pytest.mark.parametrize("axis", [0, 1, 3, (1, 3), (0, 2), ()])
@pytest.mark.parametrize(
    ("step", "reverse"), [(1, False), (2, False), (1, True)], ids=["dense", "strided", "reversed"]
)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_any_strides(chosen, axis, step, reverse, weighted):
    """x, dy and out each lie in another order; values against float64."""
    shape = (5, 18, 7, 33)
    x = strided(shape, step, (0, 2, 3, 1), reverse)
    dy = strided(shape, 1, (3, 1, 0, 2), not reverse) - 3
    kept = axis if isinstance(axis, tuple) else (axis,)
    axes = tuple(i for i in range(4) if i not in kept)
    channels = tuple(shape[i] for i in kept)
    rng = np.random.default_rng(0)
    gamma, beta = rng.uniform(0.5, 2, channels), rng.standard_normal(channels)
    where = rng.uniform(0, 1, (5, 1, 7, 33)) * (rng.random((5, 1, 7, 33)) > 0.3) if weighted else None

    expected, mean, var, w, n = float64_oracle(x, gamma, beta, axes, where)
    out = strided(shape, 2, (1, 0, 3, 2), False)
    y, stats = bn.batch_norm(x, gamma, beta, axis=axis, where=where, out=out)
    assert y is out
    np.testing.assert_allclose(y, expected, rtol=0, atol=4e-6)
    exact = bn.moments(x, axis=axis, where=where)
    np.testing.assert_allclose(exact.mean, mean.reshape(channels), rtol=1e-13)
    np.testing.assert_allclose(exact.var, var.reshape(channels), rtol=1e-12)
    coarse = 2.0**-24 if chosen == "native" and not weighted else 1e-13  # as `verdict.moments` has it
    np.testing.assert_allclose(stats.mean, exact.mean, rtol=1e-13, atol=coarse)
    np.testing.assert_allclose(stats.var, exact.var, rtol=1e-12 + 2 * coarse)

    rstd = 1 / np.sqrt(var + 1e-5)
    scaled, g = (x - mean) * rstd, dy.astype(np.float64)
    dgamma, dbeta = (g * scaled).sum(axes, keepdims=True), g.sum(axes, keepdims=True)
    dx = gamma.reshape(n.shape) * rstd * (g - w * (dbeta + scaled * dgamma) / n)
    grads = bn.batch_norm_backward(dy, x, exact, gamma, axis=axis, where=where)
    np.testing.assert_allclose(grads[0], dx, rtol=0, atol=1e-5)
    np.testing.assert_allclose(grads[1], dgamma.reshape(channels), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(grads[2], dbeta.reshape(channels), rtol=1e-9, atol=1e-9)

    into = dy.copy(order="K")
    grads = bn.batch_norm_backward(into, x, exact, gamma, axis=axis, where=where, out=into)
    assert grads[0] is into
    np.testing.assert_allclose(into, dx, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["second", "last"])
@pytest.mark.parametrize("shape", [(2, 3, 512, 600), (32, 64, 28, 28), (32, 512, 7, 7), (4096, 48)])
@pytest.mark.parametrize("chosen", ["native", "numpy"], indirect=True)
def test_threads_change_nothing(chosen, shape, layout):
    """Bit for bit, forward, backward and inference, with and without weights."""
    x = data.batch(shape, mean=100.0)
    dy = data.batch(shape, seed=1)
    axis = 1
    if layout == "last":
        order = (0, *range(2, len(shape)), 1)
        x, dy, axis = (
            np.ascontiguousarray(x.transpose(order)),
            np.ascontiguousarray(dy.transpose(order)),
            -1,
        )
    where = np.random.default_rng(0).random((shape[0], *[1] * (len(shape) - 1))) > 0.2
    results = []
    try:
        for n in (1, 2, 3, 7):
            bn.set_num_threads(n)
            found = []
            for w in (None, where):
                y, stats = bn.batch_norm(x, axis=axis, where=w)
                found += [y, *stats, *bn.batch_norm_backward(dy, x, stats, axis=axis, where=w)]
            results.append([*found, bn.normalize(x, stats.mean, stats.var, axis=axis)])
    finally:
        bn.set_num_threads(None)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("first", [1e6, -3e4])
def test_a_first_value_far_from_the_rest(chosen, first):
    """The pivot is taken from the first values: a bad one must not cost digits."""
    for shape, axis in (((3000, 4), 1), ((4, 3000), 0), ((40, 20, 60), 1)):
        x = data.batch(shape, mean=1.0)
        head = [slice(None) if i == axis else slice(0, 20) for i in range(len(shape))]
        x[tuple(head)] += first
        verdict.moments(bn.moments(x, axis=axis), Problem(x, axis=(axis,)))


@pytest.mark.parametrize("gradient", ["float16", "float32", "float64"])
def test_gradients_of_another_dtype(chosen, gradient):
    x = data.batch((40, 6, 9), mean=2.0)
    dy = data.batch((40, 6, 9), seed=3).astype(gradient)
    _, stats = bn.batch_norm(x)
    grads = bn.batch_norm_backward(dy, x, stats)
    expected = bn.batch_norm_backward(dy.astype(np.float64), x.astype(np.float64), stats)
    assert grads[0].dtype == np.float32
    np.testing.assert_allclose(grads[0], expected[0], rtol=0, atol=2e-6)
    fixed = bn.normalize_backward(dy, x, stats.mean, stats.var, out=np.empty_like(x))
    np.testing.assert_allclose(fixed[0], dy / np.sqrt(stats.var + 1e-5)[:, None], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_round_to_nearest_even(dtype):
    """Every 16-bit value, NaN and Inf included, and what lies between two, as NumPy rounds them."""
    from batchnorm.testing.libraries import numpy_dtype

    kind = numpy_dtype(dtype)
    x = np.arange(2**16, dtype=np.uint16).view(kind).reshape(-1, 1)
    shift = np.array([3.0])
    with kernels("native"), np.errstate(all="ignore"):
        y = bn.normalize(x, np.zeros(1), np.ones(1), np.array([1.1]), shift, eps=0.0)
        expected = (x.astype(np.float32) * np.float32(1.1) + np.float32(3.0)).astype(kind)
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(y.astype(np.float32)), nan)
    off = abs(y.view(np.int16).astype(int) - expected.view(np.int16).astype(int))[~nan]
    assert off.max() <= 1  # a product that is added unrounded, once in a while
    assert (off != 0).mean() < 1e-3


def test_special_values_pass_through(chosen):
    x = data.batch((50, 3, 40))
    x[0, 0, 0], x[1, 1, 1] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        y, stats = bn.batch_norm(x)
    assert np.isnan(y[:, :2]).all()
    assert np.isfinite(y[:, 2]).all()
    verdict.moments(bn.moments(x[:, 2:]), Problem(x[:, 2:]))
    assert np.isnan(stats.mean[0])


def test_kernels_say_which_and_why():
    x = np.zeros((4, 3), np.float32)
    assert bn.kernels_for(x).name == "native"
    with pytest.raises(TypeError, match="x: got dtype >f4, expected one of float16"):
        bn.kernels_for(x.astype(">f4"))
    bytes_ = np.zeros(4 * 3 * 4 + 1, np.uint8)
    odd = bytes_[1:].view(np.float32).reshape(4, 3)
    assert "aligned" in bn.kernels_for(odd).why
    odd[...] = data.batch((4, 3))
    y, _ = bn.batch_norm(odd)
    np.testing.assert_array_equal(y, bn.batch_norm(odd, out=y)[0])
    with (
        kernels("native"),
        pytest.raises(TypeError, match=r"kernels: got 'native' asked for, but values"),
    ):
        bn.batch_norm(odd)


def test_torch_keeps_its_gradients():
    torch = pytest.importorskip("torch")
    x = torch.randn(6, 3)
    assert bn.kernels_for(x).name == "native"
    gamma = torch.ones(3, requires_grad=True)
    assert "differentiates" in bn.kernels_for(x, gamma).why
    y, _ = bn.batch_norm(x, gamma)
    y.square().sum().backward()
    assert gamma.grad is not None
    with torch.no_grad():
        assert bn.kernels_for(x, gamma).name == "native"
    assert bn.kernels_for(torch.randn(6, 3, device="meta")).name == "generic"


def test_torch_shares_its_memory():
    torch = pytest.importorskip("torch")
    x = torch.randn(8, 4, 5, 5).to(memory_format=torch.channels_last)
    y, stats = bn.batch_norm(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    assert bn.batch_norm(x, out=out)[0] is out
    torch.testing.assert_close(out, torch.nn.functional.batch_norm(x, None, None, training=True))
    dx, *_ = bn.batch_norm_backward(out, x, stats, out=out)
    assert dx is out


def test_errors_name_what_was_asked():
    with pytest.raises(
        ValueError,
        match=r"name: got 'fast', expected one of 'native', 'numpy', 'cupy', 'jax', 'generic'",
    ):
        bn.set_kernels("fast")
    jax = pytest.importorskip("jax.numpy")
    with kernels("numpy"), pytest.raises(TypeError, match="x is an array of jax"):
        bn.batch_norm(jax.ones((4, 3)))
    code = "import numpy as np, batchnorm as bn; bn.batch_norm(np.ones((4, 3)))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"BATCHNORM_KERNELS": "quick"}, capture_output=True, text=True
    )
    assert "BATCHNORM_KERNELS: got 'quick', expected one of" in done.stderr


# Of the conformance suite, in two seconds.
FEW = "test_layouts or test_training_step or test_merge"


@pytest.mark.parametrize(
    ("cases", "least"),
    [(FEW, 50), pytest.param("test_", 450, marks=pytest.mark.slow)],
    ids=["few", "all"],
)
@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_conformance_of_every_instruction_set(name, cases, least, tmp_path):
    """The suite runs on the instruction set in use; here it runs on the others of this processor."""
    present, used = core.load().instruction_sets()
    if name == used or name not in present:
        pytest.skip("the suite runs on it" if name == used else f"this processor has no {name}")
    suite = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "batchnorm.testing"]
    few = ["-m", "not large"]  # whose oracle takes longer than any kernels
    done = subprocess.run(
        [sys.executable, *suite, *few, "--array-library", "numpy", "-k", f"native and ({cases})"],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
        env={**os.environ, "BATCHNORM_ISA": name},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= least


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_the_named_instruction_set_is_used(name):
    code = "from batchnorm import core; print(core.load().instruction_sets()[1])"
    present, _ = core.load().instruction_sets()
    if name not in present:
        pytest.skip(f"this processor has no {name}")
    environment = {**os.environ, "BATCHNORM_ISA": name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{name}\n", done.stderr


@pytest.mark.parametrize("name", ["native", "numpy", "generic"])
@pytest.mark.parametrize(("shape", "axis"), [((4, 0), 1), ((4, 0, 3), 1), ((300, 5, 0), -1)])
def test_no_channels(name, shape, axis):
    """An array without channels has nothing to normalize, and that is no error."""
    x = np.ones(shape, np.float32)
    with kernels(name):
        y, stats = bn.batch_norm(x, axis=axis)
        dx, dgamma, _ = bn.batch_norm_backward(x, x, stats, axis=axis)
        assert y.shape == dx.shape == bn.normalize(x, stats.mean, stats.var, axis=axis).shape == shape
        assert stats.mean.shape == dgamma.shape == (0,)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_streamed_results_have_the_same_bits(dtype, axis, masked):
    """Of more than 8 MiB, which are stored past the caches: for any number of threads, and in place."""
    shape = (6, 8, 400, 250) if axis == 1 else (6, 400, 250, 8)
    x, dy = (data.batch(shape, dtype, mean=m, seed=s) for m, s in ((3.0, 1), (0.0, 2)))
    assert x.nbytes > 2**23
    where = np.random.default_rng(0).random((6, *[1] * 3)) > 0.2 if masked else None
    results = []
    try:
        with kernels("native"):
            for n in (1, 2, 3):
                bn.set_num_threads(n)
                y, stats = bn.batch_norm(x, axis=axis, where=where)
                grads = bn.batch_norm_backward(dy, x, stats, axis=axis, where=where)
                frozen = bn.normalize(x, stats.mean, stats.var, axis=axis)
                results.append([y, *stats, *grads, frozen])
            here, there = x.copy(), dy.copy()  # in place, nothing is stored past the caches
            bn.batch_norm(here, axis=axis, where=where, out=here)
            bn.batch_norm_backward(there, x, stats, axis=axis, where=where, out=there)
    finally:
        bn.set_num_threads(None)
    results += [[here, *results[0][1:5], there, *results[0][6:]]]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    wide = x.astype(np.float64) - 3.0
    kept = tuple(i for i in range(4) if i != axis % 4)
    w = np.broadcast_to(1.0 if where is None else where, shape)
    mean = np.average(wide, axis=kept, weights=w)
    np.testing.assert_allclose(results[0][2] - 3.0, mean, atol=1e-6)


def test_oracle_is_not_ours():
    """The oracle of these tests agrees with the suite's, in 50 digits."""
    x = data.batch((7, 3, 5), mean=1e3)
    y, mean, *_ = float64_oracle(x, np.ones(3), np.zeros(3), (0, 2))
    exact = Problem(x)
    assert oracle is not None
    np.testing.assert_allclose(y, np.asarray(exact.y, dtype=float), rtol=0, atol=1e-9)
    np.testing.assert_allclose(mean.ravel(), np.asarray(exact.flat(exact.mean), dtype=float), rtol=1e-12)


class Own(bn.Backend):
    """A backend for arrays of a dtype, which counts its calls."""

    scale_shift = GENERIC.scale_shift
    grad_sums = GENERIC.grad_sums
    grad_input = GENERIC.grad_input

    def __init__(self, name, dtype):
        self.name, self.dtype, self.calls = name, dtype, []

    def refuses(self, arrays):
        return None if arrays[0].dtype == self.dtype else f"its arrays are not {self.dtype}"

    def moments(self, *arguments):
        self.calls.append(self.name)
        return GENERIC.moments(*arguments)


@pytest.fixture
def added():
    """Add kernels, and take them away at the end."""
    taken = []
    yield lambda *arguments: taken.append(bn.add_kernels(*arguments))
    for remove in taken:
        remove()


def test_kernels_of_one_s_own(added):
    """An added backend comes first, the newest before others, unless it refuses or is not asked for."""
    x = data.batch((8, 3))
    plain = bn.kernels_for(x).name
    first = Own("first", np.float32)
    added(np.ndarray, first)
    assert bn.kernels_for(x).name == "first"
    added(np.ndarray, Own("second", np.float64))
    assert bn.kernels_for(x).name == "first"
    assert bn.kernels_for(x.astype(float)).name == "second"
    found = bn.kernels_for(x.astype(np.float16))
    assert found.name == plain
    assert "its arrays are not" in found.why
    layer = bn.BatchNorm(3)
    y = layer(x)
    dx = layer.backward(x)
    assert first.calls == ["first"]
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), atol=1e-6)
    with kernels("generic"):
        assert bn.kernels_for(x).name == "generic"
        np.testing.assert_allclose(dx, bn.batch_norm_backward(x, x, bn.moments(x))[0], atol=1e-7)
    remove = bn.add_kernels(np.ndarray, Own("third", np.float32))
    assert bn.kernels_for(x).name == "third"
    remove()
    assert bn.kernels_for(x).name == "first"


def test_wrong_kernels_of_one_s_own():
    for wrong, text in (
        ((3, Own("mine", None)), "kind: got 3, expected a class of arrays"),
        ((np.ndarray, len), "backend: got .*, expected a Backend"),
    ):
        with pytest.raises(TypeError, match=text):
            bn.add_kernels(*wrong)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_four_kernels_make_every_pass(added, dtype):
    """Functions that ignore `out`: results of every pass, in `out` too, against another backend."""
    functions = (GENERIC.moments, GENERIC.scale_shift, GENERIC.grad_sums, GENERIC.grad_input)
    x, dy = data.batch((9, 3, 4), dtype), data.batch((9, 3, 4), "float32", seed=5)
    gamma, beta = data.parameters((3,))

    def passes():
        out = [np.full_like(x, np.nan) for _ in range(4)]
        y, stats = bn.batch_norm(x, gamma, beta, out=out[0])
        mean, var = stats[1:3]
        results = [
            (y,),
            bn.batch_norm_backward(dy, x, stats, gamma, out=out[1]),
            (bn.normalize(x, mean, var, gamma, beta, out=out[2]),),
            bn.normalize_backward(dy, x, mean, var, gamma, stats_grad=True, out=out[3]),
        ]
        assert all(found[0] is a for found, a in zip(results, out, strict=True))
        return [v for found in results for v in found]

    expected = passes()
    added(np.ndarray, bn.KernelSet("four", "four functions", *functions))
    assert bn.kernels_for(x).name == "four"
    eps = np.finfo(dtype).eps
    for a, b in zip(passes(), expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_allclose(a, b, rtol=0, atol=32 * eps * np.abs(b).max())


def test_gradients_that_are_views_of_dy(added):
    """A backend whose sums are views of dy, one value per channel, written to by `out`."""

    class Views(Own):
        def grad_sums(self, dy, x, m, w, layout):
            return dy, dy * (x - m)

    added(np.ndarray, Views("views", np.float64))
    dy, x = data.batch((5,), "float64"), data.batch((5,), "float64", seed=1)
    mean, var = np.zeros(5), np.full(5, 3.0)
    before = dy.copy()
    dx, _, dbeta = bn.normalize_backward(dy, x, mean, var, axis=0, out=dy)
    assert dx is dy
    np.testing.assert_array_equal(dbeta, before)


@pytest.mark.parametrize("shape", [(300, 70_000), (70, 3, 40_000)])
def test_numpy_keeps_few_moments_of_blocks(shape):
    """Of many channels, each block has some, so that its moments are small beside its values."""
    from batchnorm.backends.blocks import plan_of

    strides = np.empty(shape, np.float32).strides
    plan = plan_of(shape, strides, (len(shape) - 1,))
    assert plan.rows * shape[-1] * 4 * 8 <= 0.25 * np.prod(shape) * 4
    covered = sum(np.prod([s.stop - s.start for s in block.selection]) for block in plan.blocks)
    assert covered == np.prod(shape)


def test_kernels_of_one_s_own_on_tensors(added):
    """PyTorch does not see what they do: they run behind this package's operators."""
    torch = pytest.importorskip("torch")
    import batchnorm.torch

    class Unseen(Own):
        def refuses(self, arrays):
            seen = torch.is_grad_enabled() and arrays[0].requires_grad
            assert not seen, "PyTorch cannot differentiate what these kernels do"
            return super().refuses(arrays)

    mine = Unseen("mine", torch.float32)
    unseen, calls = mine, mine.calls
    added(torch.Tensor, unseen)
    x = torch.randn(8, 3, requires_grad=True)
    weights = torch.randn(8, 3)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), x)
    y, _ = bn.batch_norm(x)
    (found,) = torch.autograd.grad((y * weights).sum(), x)
    assert calls == ["mine"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    net = batchnorm.torch.convert(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    (found,) = torch.autograd.grad((net(x) * weights).sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    found = torch.func.grad(lambda v: (bn.batch_norm(v)[0] * weights).sum())(x.detach())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_no_axes(chosen):
    """Arrays without axes: outputs are arrays, not numbers."""
    x, two = np.array(3.0), np.array(2.0)
    y = bn.normalize(x, np.array(1.0), two, axis=(), eps=0)
    np.testing.assert_allclose(y, 2**0.5)
    dx, *_ = bn.normalize_backward(x, x, np.array(1.0), two, axis=(), eps=0)
    np.testing.assert_allclose(dx, 3 / 2**0.5)
