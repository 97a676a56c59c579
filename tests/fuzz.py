"""Random calls of every public function, judged by the oracle.

Shapes, axes, dtypes, and the memory of each argument by itself: order of axes, steps, reversed,
stride 0, unaligned, read-only, `out` that is x or dy.

python tests/fuzz.py TARGET [--cases 20000] [--first 0]

TARGET is one of the suite's, "numpy[native]" or "torch[cpu-numpy]" say. A case is its number alone: with
`--first N --cases 1` it runs again.
"""

import argparse
import decimal
import sys
import traceback

import numpy as np

import batchnorm as bn
from batchnorm.epilogue import ACTIVATIONS
from batchnorm.testing import data, verdict
from batchnorm.testing.libraries import numpy_dtype, targets
from batchnorm.testing.oracle import Problem, decimals, precise

FLOATS = ("float16", "bfloat16", "float32", "float64")
OFFSETS = {"float16": 8.0, "bfloat16": 2.0, "float32": 1e6, "float64": 1e8}
# What loops and sums change their way at lies between these: vectors, leaves, rows, segments.
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100, 129, 513)
MOST = 3000  # values
STEP = decimal.Decimal("1e-15")


class Draw:
    """Random choices of one case."""

    def __init__(self, number, target):
        self.rng = np.random.default_rng(number)
        self.target = target
        self.skewed = getattr(target, "kernels", "") != "native"  # which refuses big arrays so
        self.shape = ()
        self.floats = FLOATS if target.library != "array_api_strict" else FLOATS[2:]

    def flip(self, probability=0.5):
        return self.rng.random() < probability

    def one(self, options):
        return options[self.rng.integers(len(options))]

    def layout(self, empty=False):
        """A shape and its channel axes, as a call is given them."""
        while True:
            ndim = self.rng.integers(1, 6)
            shape = tuple(int(self.one(LENGTHS[: self.one((5, 9, 17))])) for _ in range(ndim))
            if empty and self.flip(0.05):
                shape = (0, *shape[1:])
            if np.prod(shape) > MOST:
                continue
            count = self.one((0, 1, 1, 1, 2, 2, 3))
            if count > ndim:
                continue
            kept = tuple(sorted(int(a) for a in self.rng.permutation(ndim)[:count]))
            reduced = [n for i, n in enumerate(shape) if i not in kept]
            if empty or np.prod(reduced) >= 2:
                break
        self.shape = shape
        given = tuple(int(a - self.flip() * ndim) for a in kept)
        axis = given[0] if count == 1 and self.flip(0.8) else given
        return shape, axis

    def laid(self, a, vector=False, writable=False, broadcast=True):
        """An array, somehow in memory; along some axes perhaps the first value again and again."""
        vector = vector and a.shape != self.shape  # else kernels take it for a big one
        if self.flip(0.15):
            return a.copy()
        if broadcast and a.ndim and not writable and self.flip(0.1):
            along = int(self.rng.integers(a.ndim))
            return (
                np.broadcast_to(self.laid(a.take([0], along), vector), a.shape) if a.size else a.copy()
            )
        order = self.rng.permutation(a.ndim) if self.flip() else np.arange(a.ndim)
        steps = [int(self.one((1, 1, 1, 2, 3))) * self.one((1, 1, 1, -1)) for _ in order]
        shape = [a.shape[i] * abs(s) for i, s in zip(order, steps, strict=True)]
        size = int(np.prod(shape)) * a.itemsize
        skew = 1 if (vector or self.skewed) and self.flip(0.1) else 0
        whole = np.ndarray(shape, a.dtype, np.zeros(size + skew, np.uint8), offset=skew)
        view = whole[(*(slice(None, None, s) for s in steps), ...)].transpose(np.argsort(order))
        view[...] = a
        view.flags.writeable = writable or self.flip(0.8)
        return view

    def dtype(self, wide=False):
        return self.one(FLOATS[2:] if wide else self.floats)

    def vector(self, shape, low=None, high=None, dtype=None):
        """A per-channel argument of any dtype, or of some."""
        v = self.rng.uniform(low, high, shape) if low is not None else self.rng.standard_normal(shape)
        return self.laid(np.asarray(v, numpy_dtype(dtype or self.dtype())), vector=True)

    def big(self, shape, dtype, **options):
        """Values around a mean of each channel's or all's own."""
        mean = OFFSETS[dtype] * self.one((0, 1e-3, 1)) * self.rng.uniform(-1, 1)
        x = self.rng.standard_normal(shape) * self.one((1, 1, 30)) + mean
        return self.laid(x.astype(numpy_dtype(dtype)), **options)

    def gradient(self, shape):
        dy = self.rng.standard_normal(shape) + self.one((0, 0.5))
        return self.laid(dy.astype(numpy_dtype(self.dtype())))

    def where(self, shape, reduced):
        """A mask or weights, of which at least two values of each channel weigh something; or none."""
        if self.flip(0.6):
            return None
        own = [1 if self.flip(0.2) else n for n in shape][self.one((0, 0, 0, 1)) :]
        mask = self.rng.random(own) < 0.7
        kind = self.one(("bool", *self.floats, "uint8", "int64"))
        if kind != "bool":
            mask = np.where(mask, self.rng.integers(1, 9, own) / (1 if "int" in kind else 4), 0)
        mask = self.laid(np.asarray(mask, numpy_dtype(kind)))
        enough = np.sum(np.broadcast_to(mask, shape) > 0, axis=reduced)
        return mask if np.all(enough >= 2) else None

    def epilogue(self, shape, dtype, **options):
        """A residual and an activation, or None for either."""
        z = (self.rng.standard_normal(shape) * 3).astype(numpy_dtype(dtype))
        kinds = (None, None, *ACTIVATIONS, ("leaky_relu", 0.25))
        return self.laid(z, **options) if self.flip(0.4) else None, self.one(kinds)

    def through(self, problem, dy, z, y, activation, dtype):
        """What a backward pass is given of the epilogue, and dy without what roundings decide."""
        near = problem.near_a_kink(dtype)
        if np.any(near):
            dy = np.where(near, np.zeros_like(dy), dy)
        from_y = activation not in (None, "silu") and self.flip()
        residual = None if z is None else True if from_y or (activation is None and self.flip()) else z
        return dy, residual, self.laid(y, broadcast=False) if from_y else None

    def moments(self, problem):
        """The moments of a problem, each field in memory as it likes."""
        fields = [np.asarray(problem.flat(v)) for v in (problem.n, problem.mean, problem.var)]
        n, mean, var = (v.astype(np.float64) for v in fields)
        rounded = decimals(mean) if fields[1].dtype == object else mean
        low = np.asarray(fields[1] - rounded).astype(np.float64)
        laid = [self.laid(v, vector=True, broadcast=False) for v in (n, mean, var, low)]
        if n.size and np.all(n == n.ravel()[0]) and self.flip(0.2):
            laid[0] = float(n.ravel()[0])
        return bn.Moments(*laid)

    def call(self, f, *arguments, out=None, aliased=None):
        """Give a function's results in NumPy, and see that nothing but `out` was written to.

        `out` is an array of NumPy's; `aliased` the number of the argument that it is.
        """
        into = self.target.asarray
        before = [a.copy() if isinstance(a, np.ndarray) else a for a in flat(arguments)]
        given = mapped(into, arguments)
        options = {}
        if self.target.library == "jax":  # whose arrays nothing can be written to
            aliased = out = None
        if aliased is not None:
            options = {"out": given[aliased]}
        elif out is not None:
            options = {"out": into(out)}
        result = f(*given, **options)
        for i, (a, b) in enumerate(zip(before, flat(given), strict=True)):
            if isinstance(a, np.ndarray) and i != aliased:
                np.testing.assert_array_equal(self.target.to_numpy(b), a, f"argument {i} was changed")
        if options:
            first = result[0] if isinstance(result, tuple) else result
            assert first is options["out"], "the first result is not `out`"
        return mapped(self.target.returned, result)

    def out(self, x):
        """An `out` of its own for a result like x, or None."""
        if self.flip(0.6):
            return None
        return self.laid(np.full(x.shape, 7, x.dtype), writable=True)


def mapped(f, tree):
    if isinstance(tree, tuple):
        made = [mapped(f, v) for v in tree]
        return type(tree)(*made) if hasattr(tree, "_fields") else tuple(made)
    return f(tree) if hasattr(tree, "dtype") else tree


def flat(tree):
    return [leaf for v in tree for leaf in flat(v)] if isinstance(tree, tuple) else [tree]


def reduced_of(shape, axis):
    kept = {a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))}
    return tuple(i for i in range(len(shape)) if i not in kept)


def parameters_of(dtype, gamma):
    """The dtype of dgamma and dbeta."""
    if gamma is not None:
        return gamma.dtype.name
    return "float64" if dtype == "float64" else "float32"


def coarser(right, activation, dtype, **results):
    """Sizes for gradients of float64 parameters, of data that is narrower.

    The derivative of an activation that does more than to pick values is float32 arithmetic.
    """
    if dtype == "float64" or activation in (None, "relu", "relu6"):
        return right
    coarse = decimal.Decimal(verdict.EPS["float32"] / verdict.EPS["float64"])
    wide = [f"{name}_size" for name, kind in results.items() if kind == "float64"]
    return right._replace(**{name: getattr(right, name) * coarse for name in wide})


def training(draw):
    """batch_norm and batch_norm_backward."""
    shape, axis = draw.layout()
    dtype, reduced = draw.dtype(), reduced_of(shape, axis)
    vector, eps = data.channels(shape, axis), draw.one((1e-5, 1e-3, 1.0))
    aliased = draw.one((None,) * 8 + (0, 4))
    x = draw.big(shape, dtype, writable=aliased == 0)
    original = x.copy()
    gamma, beta = (draw.vector(vector) if draw.flip(0.8) else None for _ in range(2))
    where = draw.where(shape, reduced)
    z, activation = draw.epilogue(shape, dtype, writable=aliased == 4)
    aliased = None if aliased == 4 and z is None else aliased
    added = None if z is None else z.copy()
    options = {"axis": axis, "eps": eps}

    def forward(x, gamma, beta, where, z, **out):
        named = {**options, **out, "where": where, "residual": z, "activation": activation}
        return bn.batch_norm(x, gamma, beta, **named)

    y, stats = draw.call(forward, x, gamma, beta, where, z, out=draw.out(x), aliased=aliased)
    named = {**options, "residual": added, "activation": activation}
    expected = Problem(original, gamma, beta, where=where, **named)
    verdict.forward(y, expected, dtype)
    verdict.moments(stats, expected, x.dtype.name)

    dy, x = draw.gradient(shape), draw.laid(original, broadcast=False)
    dy, residual, y = draw.through(expected, dy, added, y, activation, dtype)
    out, aliased = draw.out(x), None
    if dy.dtype == x.dtype and dy.flags.writeable and 0 not in dy.strides and draw.flip(0.2):
        aliased = 0
    first = dy.copy()

    def backward(dy, x, stats, gamma, beta, where, residual, y, **out):
        named = {**options, **out, "where": where, "activation": activation}
        return bn.batch_norm_backward(dy, x, stats, gamma, beta, residual=residual, y=y, **named)

    stats = draw.moments(expected)
    given = (dy, x, stats, gamma, beta, where, residual, y)
    grads = draw.call(backward, *given, out=out, aliased=aliased)
    parameters = parameters_of(dtype, gamma)
    right = expected.backward(first, y)
    if residual is not None:
        verdict.dresidual(grads[3], right, dtype)
    # What weighs nothing may lie many std from the mean, and its dy still counts in the sums.
    # And a variance of 0 is not quite that in 50 digits.
    right = right._replace(
        dx_size=np.maximum(right.dx_size, abs(right.dx)),
        dgamma_size=right.dgamma_size + decimal.Decimal("1e-40"),
    )
    right = coarser(right, activation, dtype, dgamma=parameters, dbeta=parameters)
    verdict.backward(grads[:3], right, dtype, parameters)


def inference(draw):
    """normalize and normalize_backward."""
    shape, axis = draw.layout(empty=True)
    dtype = draw.dtype()
    vector, eps = data.channels(shape, axis), draw.one((1e-5, 1e-3, 1.0))
    aliased = 0 if draw.flip(0.2) else None
    x = draw.big(shape, dtype, writable=aliased == 0)
    original = x.copy()
    kind = draw.dtype()
    mean = draw.vector(vector, dtype=draw.dtype(wide=True))
    var = draw.vector(vector, 0.3, 3, dtype=kind)
    gamma, beta = (draw.vector(vector) if draw.flip(0.8) else None for _ in range(2))
    z, activation = draw.epilogue(shape, dtype)
    options = {"axis": axis, "eps": eps}

    def forward(x, mean, var, gamma, beta, z, **out):
        named = {**options, **out, "residual": z, "activation": activation}
        return bn.normalize(x, mean, var, gamma, beta, **named)

    y = draw.call(forward, x, mean, var, gamma, beta, z, out=draw.out(x), aliased=aliased)
    named = {**options, "residual": z, "activation": activation}
    expected = Problem(original, gamma, beta, mean=mean, var=var, **named)
    verdict.forward(y, expected, dtype)
    if not x.size:
        return
    dy, x = draw.gradient(shape), draw.laid(original, broadcast=False)
    dy, residual, y = draw.through(expected, dy, z, y, activation, dtype)

    def backward(dy, x, mean, var, gamma, beta, residual, y, **out):
        named = {**options, **out, "residual": residual, "activation": activation, "y": y}
        return bn.normalize_backward(dy, x, mean, var, gamma, beta, stats_grad=True, **named)

    given = (dy, x, mean, var, gamma, beta, residual, y)
    dx, dgamma, dbeta, *dz, dmean, dvar = draw.call(backward, *given, out=draw.out(x))
    right = expected.backward(dy, y)
    if residual is not None:
        verdict.dresidual(dz[0], right, dtype)
    parameters = parameters_of(dtype, gamma)
    kinds = {"dgamma": parameters, "dbeta": parameters, "dmean": mean.dtype.name, "dvar": var.dtype.name}
    right = coarser(right, activation, dtype, **kinds)
    verdict.backward((dx, dgamma, dbeta), right, dtype, parameters)
    for name, v, like in (("dmean", dmean, mean), ("dvar", dvar, var)):
        size, own = getattr(right, f"{name}_size"), like.dtype.name
        assert v.dtype == like.dtype
        verdict._close_or_rounded(v, getattr(right, name), size, own, verdict.BACKWARD, name)


def merging(draw):
    """moments, Moments.merge and update_running."""
    shape, axis = draw.layout(empty=True)
    dtype = draw.dtype()
    x = draw.big(shape, dtype)
    where = draw.where(shape, reduced_of(shape, axis))
    stats = draw.call(lambda x, where: bn.moments(x, axis=axis, where=where), x, where)
    if not x.size:
        assert all(np.all(v == 0) for v in stats)
        return
    whole = Problem(x, axis=axis, where=where)
    verdict.moments(stats, whole)
    cut = int(draw.rng.integers(0, shape[0] + 1))
    halves = []
    if where is None and 0 in reduced_of(shape, axis):
        parts = [part for part in (x[:cut], x[cut:]) if part.size]
        halves = [draw.moments(Problem(part, axis=axis)) for part in parts]
        verdict.moments(draw.call(bn.Moments.merge, *halves), whole)

    vector = data.channels(shape, axis)
    mean = draw.vector(vector, -3, 3, draw.dtype(wide=True))
    var = draw.vector(vector, 0.3, 3, draw.dtype(wide=True))
    momentum, correction = draw.one((0.1, 0.5, 1.0)), draw.one((0, 1))
    if np.any(whole.n <= correction):
        return
    options = {"momentum": momentum, "correction": correction}
    moved = draw.call(
        lambda m, v, s: bn.update_running(m, v, s, **options), mean, var, draw.moments(whole)
    )
    fields = map(whole.flat, (whole.n, whole.mean, whole.var))
    n, batch_mean, batch_var = (v if v.dtype == object else decimals(v) for v in fields)
    m = decimals(np.asarray(momentum))[()]
    for name, old, batch, new in (
        ("mean", mean, batch_mean, moved[0]),
        ("var", var, batch_var * n / (n - correction), moved[1]),
    ):
        right, size = (1 - m) * decimals(old) + m * batch, abs(decimals(old)) + abs(batch)
        assert new.dtype == old.dtype
        verdict.assert_close(new, right, size, new.dtype.name, 2, f"running {name}")


def folding(draw):
    """fold, fold_linear and fold_conv."""
    vector = draw.layout()[0]
    dtype = draw.dtype(wide=True)
    eps = draw.one((1e-5, 1.0))
    mean, var = draw.vector(vector, dtype=dtype), draw.vector(vector, 0.3, 3)
    gamma, beta = (draw.vector(vector) if draw.flip(0.8) else None for _ in range(2))
    scale, shift = draw.call(lambda *a: bn.fold(*a, eps=eps), mean, var, gamma, beta)

    def exact(mean, var, gamma, beta, bias):
        m, v = decimals(mean), decimals(var)
        g = 1 if gamma is None else decimals(gamma)
        b, z = (0 if a is None else decimals(a) for a in (beta, bias))
        scale = g / np.sqrt(v + decimals(np.asarray(eps))[()])
        return scale, (z - m) * scale + b, (abs(z) + abs(m)) * abs(scale) + abs(b)

    right, right_shift, size = exact(mean, var, gamma, beta, None)
    verdict.assert_close(scale, right, abs(right), dtype, 2, "scale")
    verdict.assert_close(shift, right_shift, size, dtype, 2, "shift")

    layout = draw.one(("OI", "IO", "OIHW", "HWIO", "IOHW", "OIL"))
    sizes = {letter: int(draw.one(LENGTHS[:6])) for letter in layout}
    weight = draw.big(tuple(sizes.values()), dtype)
    n = (sizes["O"],)
    mean, var, bias = draw.vector(n), draw.vector(n, 0.3, 3), draw.vector(n) if draw.flip() else None
    gamma, beta = (draw.vector(n) if draw.flip(0.8) else None for _ in range(2))
    fold = bn.fold_linear if len(layout) == 2 else bn.fold_conv
    given = (weight, bias, mean, var, gamma, beta)
    folded, shift = draw.call(lambda *a: fold(*a, eps=eps, layout=layout), *given)
    scale, right_shift, size = exact(mean, var, gamma, beta, bias)
    along = [1] * len(layout)
    along[layout.index("O")] = -1
    right = scale.reshape(along) * decimals(weight)
    verdict.assert_close(folded, right, abs(right), dtype, 2, "folded")
    verdict.assert_close(shift, right_shift, size, dtype, 2, "folded bias")


def derivatives(draw):
    """batch_norm_jvp and batch_norm_double_backward, the latter along random directions."""
    shape, axis = draw.layout()
    if np.prod(shape) > 300:
        return
    dtype = draw.dtype(wide=True)
    vector, reduced = data.channels(shape, axis), reduced_of(shape, axis)
    x = draw.laid((draw.rng.standard_normal(shape) + draw.one((0, 30.0))).astype(dtype), broadcast=False)
    u, dy = (draw.laid(draw.rng.standard_normal(shape).astype(draw.dtype())) for _ in range(2))
    gamma = draw.vector(vector, 0.5, 2)
    a, b = (draw.vector(vector) if draw.flip(0.8) else None for _ in range(2))
    where = draw.where(shape, reduced)
    problem = Problem(x, gamma, axis=axis, where=where)
    if float(np.min(problem.var)) < 1e-2:
        return
    options = {"axis": axis}
    stats = draw.moments(problem)
    kind = "float64" if dtype == "float64" else "float32"

    def jvp(u, a, b, x, stats, gamma, where):
        return bn.batch_norm_jvp(u, a, b, x, stats, gamma, where=where, **options)

    tangents = draw.call(jvp, u, a, b, x, stats, gamma, where)
    lifted = [0 if v is None else decimals(v) for v in (a, b)]
    du, dx, dg = decimals(u), decimals(x), decimals(gamma)
    zero = decimals(np.zeros(vector))

    def shifted(t):
        found = Problem(dx + t * du, dg + t * lifted[0], zero + t * lifted[1], where=where, **options)
        return found.y, found.flat(found.mean), found.flat(found.var)

    def biggest(*arrays):
        return max((abs(v) for array in arrays for v in np.ravel(array)), default=0)

    along = [(p - q) / (2 * STEP) for p, q in zip(shifted(STEP), shifted(-STEP), strict=True)]
    slope, x_hat = biggest(problem.gamma / problem.std), biggest(problem.x_hat)
    through = 3 * slope * biggest(du) * max(1, x_hat) ** 2
    sizes = (
        through + x_hat * biggest(lifted[0]) + biggest(lifted[1]),
        biggest(du),
        2 * biggest(problem.d) * biggest(du),
    )
    for name, mine, right, size in zip(("dy", "dmean", "dvar"), tangents, along, sizes, strict=True):
        verdict.assert_close(mine, right, size + 1, kind, 32, name)

    def second(u, a, b, dy, x, stats, gamma, where):
        return bn.batch_norm_double_backward(u, a, b, dy, x, stats, gamma, where=where, **options)

    d_dy, d_x, d_gamma = draw.call(second, u, a, b, dy, x, stats, gamma, where)
    assert (d_dy.dtype, d_x.dtype, d_gamma.dtype) == (x.dtype, x.dtype, gamma.dtype)
    ddy = decimals(dy)

    def loss(dy, x, gamma):
        found = Problem(x, gamma, where=where, **options).backward(dy)
        return np.sum(du * found.dx) + np.sum(lifted[0] * found.dgamma) + np.sum(lifted[1] * found.dbeta)

    inverse = biggest(1 / problem.std)
    bounds = (
        3 * through + x_hat * biggest(lifted[0]) + biggest(lifted[1]),
        4 * inverse * (through + biggest(lifted[0])) * biggest(ddy) * max(1, x_hat),
        3 * inverse * biggest(du) * biggest(ddy) * biggest(problem.n) * max(1, x_hat) ** 2,
    )
    coarse = max(verdict.EPS[kind], verdict.EPS[gamma.dtype.name])
    for i, (name, mine) in enumerate((("d_dy", d_dy), ("d_x", d_x), ("d_gamma", d_gamma))):
        v = decimals(draw.rng.choice([-1.0, 1.0], mine.shape))

        def at(t, i=i, v=v):
            return loss(*(given + t * v if k == i else given for k, given in enumerate((ddy, dx, dg))))

        right = (at(STEP) - at(-STEP)) / (2 * STEP)
        got = np.sum(decimals(mine) * v)
        eps = verdict.EPS[kind] if i < 2 else coarse
        error = abs(got - right) / (bounds[i] + 1)
        most = 32 * eps * max(1, mine.size)
        assert error <= most, f"{name}: off by {float(error):.3g} of its terms, expected {most:.3g}"


FUNCTIONS = (training, training, training, inference, merging, folding, derivatives)


def run(number, target):
    """One case on a target; raises where something is wrong."""
    draw = Draw(number, target)
    function = FUNCTIONS[number % len(FUNCTIONS)]
    with target.active(), precise(), np.errstate(all="ignore"):
        function(draw)


def target_of(name):
    library = name.partition("[")[0]
    return next(t for t in targets(library) if repr(t) == name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target")
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--first", type=int, default=0)
    chosen = parser.parse_args()
    target, failed = target_of(chosen.target), 0
    for number in range(chosen.first, chosen.first + chosen.cases):
        try:
            run(number, target)
        except Exception as error:
            failed += 1
            if failed <= 10:
                where = traceback.extract_tb(error.__traceback__)[2:4]
                lines = ", ".join(f"{f.name}:{f.lineno}" for f in where)
                said = str(error).strip().partition("\n")[0]
                print(f"case {number}: {type(error).__name__}: {said} ({lines})", flush=True)
    print(f"{target}: {chosen.cases} cases, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
