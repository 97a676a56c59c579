"""Across libraries: this package's backends on their arrays, and the libraries' own batch norm."""

import importlib
import importlib.util

import batchnorm as bn
from batchnorm.bench.cases import case
from batchnorm.bench.contestants import CONTESTANTS, EPS, package

from .copies import in_copies
from .gate import PASSES, SHAPES, moved

AXIS = 1
CHOSEN = ("convolution", "7 x 7", "vectors")
BACKENDS = {"fastest": None, "array code": "generic"}
OWN = "its own"


def textbook(xp, x, gamma, beta, mean=None, var=None):
    """The formula in an array library's operators; in inference with statistics that are given."""
    axes = tuple(i for i in range(x.ndim) if i != AXIS)
    shape = tuple(-1 if i == AXIS else 1 for i in range(x.ndim))
    gamma, beta = xp.reshape(gamma, shape), xp.reshape(beta, shape)
    if mean is None:
        mean, var = xp.mean(x, axis=axes, keepdims=True), xp.var(x, axis=axes, keepdims=True)
    else:
        mean, var = xp.reshape(mean, shape), xp.reshape(var, shape)
    return gamma * (x - mean) / xp.sqrt(var + EPS) + beta


def ours(convert, wait=lambda v: v):
    """This package's functions on arrays that `convert` makes of NumPy's."""

    def prepare(given, which):
        call = package(convert)(given, which)
        return lambda: wait(call())

    return prepare


def formula(module, wait=lambda v: v, convert=None):
    """The textbook on arrays of a library that has no batch norm, nor derivatives."""

    def prepare(given, which):
        xp = importlib.import_module(module)
        x, _, gamma, beta, *stats = map(convert or xp.asarray, given[:6])
        if which == "backward":
            raise NotImplementedError
        stats = stats if which == "inference" else []
        return lambda: wait(textbook(xp, x, gamma, beta, *stats))

    return prepare


def on_torch(given, which):
    return package(importlib.import_module("torch").from_numpy)(given, which)


def torch_modules(modules):
    """Modules in training, differentiated by autograd, or in evaluation without it."""

    def prepare(given, which):
        torch = importlib.import_module("torch")
        x, dy = map(torch.from_numpy, given[:2])
        module = getattr(importlib.import_module(modules), f"BatchNorm{max(1, x.ndim - 2)}d")
        layer = module(x.shape[AXIS])
        if which == "inference":
            layer.eval()
            return torch.no_grad()(lambda: layer(x))
        x.requires_grad_()
        if which == "forward":
            return lambda: layer(x)
        y, inputs = layer(x), (x, *layer.parameters())
        return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)

    return prepare


def jitted(function, *given):
    jax = importlib.import_module("jax")
    program = jax.jit(function)
    on_device = [jax.numpy.asarray(v) for v in given]
    return lambda: jax.block_until_ready(program(*on_device))


def pullback(norm):
    """The gradient of a forward pass that is not timed cannot be had alone: both passes."""
    jax = importlib.import_module("jax")

    def both(x, dy, gamma, beta):
        y, back = jax.vjp(norm, x, gamma, beta)
        return y, back(dy)

    return both


def on_jax(given, which):
    x, dy, gamma, beta, mean, var = given[:6]
    if which == "forward":
        return jitted(lambda x, g, b: bn.batch_norm(x, g, b)[0], x, gamma, beta)
    if which == "inference":
        return jitted(lambda x, m, v, g, b: bn.normalize(x, m, v, g, b), x, mean, var, gamma, beta)
    return jitted(pullback(lambda x, g, b: bn.batch_norm(x, g, b)[0]), x, dy, gamma, beta)


def flax(given, which):
    nnx = importlib.import_module("flax.nnx")
    x, dy, gamma, beta, mean, var = given[:6]

    def norm(x, gamma, beta, *stats):
        settings = {"axis": AXIS, "use_running_average": bool(stats), "rngs": nnx.Rngs(0)}
        layer = nnx.BatchNorm(x.shape[AXIS], **settings)
        given = {"scale": gamma, "bias": beta} | dict(zip(("mean", "var"), stats, strict=False))
        for name, v in given.items():
            getattr(layer, name).set_value(v)
        return layer(x)

    if which == "backward":
        return jitted(pullback(norm), x, dy, gamma, beta)
    return jitted(norm, x, gamma, beta, *((mean, var) if which == "inference" else ()))


def in_chunks(a):
    dask = importlib.import_module("dask.array")
    return dask.from_array(a, chunks=(max(1, a.shape[0] // 4), *a.shape[1:]) if a.ndim > 1 else -1)


def compute(results):
    return importlib.import_module("dask").compute(results, scheduler="threads")


LIBRARIES = {
    "NumPy": ("numpy", ours(lambda a: a), formula("numpy")),
    "PyTorch, functions": ("torch", on_torch, CONTESTANTS["PyTorch"].prepare),
    "PyTorch, modules": ("torch", torch_modules("batchnorm.torch"), torch_modules("torch.nn")),
    "JAX, jit": ("jax", on_jax, flax),
    "Dask, 4 chunks": ("dask", ours(in_chunks, compute), formula("dask.array", compute, in_chunks)),
    "array-api-strict": (
        "array_api_strict",
        lambda given, which: ours(importlib.import_module("array_api_strict").asarray)(given, which),
        formula("array_api_strict"),
    ),
    "CuPy": (
        "cupy",
        lambda given, which: ours(importlib.import_module("cupy").asarray, synchronized)(given, which),
        formula("cupy", lambda results: synchronized(results)),
    ),
}


def synchronized(results):
    importlib.import_module("cupy").cuda.Device().synchronize()
    return results


class Across:
    """A pass as a multiple of a copy, with this package's backends and with the library's own code.

    JAX's and Flax's backward pass is timed with its forward pass, in copies for both.
    """

    param_names = ("library", "backend", "shape", "pass")
    params = (list(LIBRARIES), [*BACKENDS, OWN], list(CHOSEN), list(PASSES))
    unit = "copies"
    timeout = 300
    version = "1"

    def setup(self, library, backend, shape, which):
        needs, package, own = LIBRARIES[library]
        prepare = own if backend == OWN else package
        if importlib.util.find_spec(needs) is None:
            raise NotImplementedError
        if needs == "torch":
            importlib.import_module("torch").set_num_threads(bn.get_num_threads())
        bn.set_kernels(BACKENDS.get(backend))
        shape, axis = SHAPES[shape]
        assert axis == AXIS
        given, nbytes = case(shape, "second"), moved(shape, which, False)
        if needs == "jax" and which == "backward":
            nbytes += moved(shape, "forward", False)
        self.call, self.nbytes = prepare(given, which), nbytes

    def track_copies(self, library, backend, shape, which):
        return in_copies(lambda: self.call, self.nbytes, rounds=7)
