"""How a case is run on a library: arrays in, call, checks that hold for every call, arrays out.

A `Target` is a library on one of its devices or in one of its modes. `Target.call(f, *arrays)` takes
and returns NumPy arrays, so that a case is one body for eager, compiled and lazy libraries alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

import batchnorm as bn
from batchnorm import core
from batchnorm.backends import dispatch
from batchnorm.capabilities import LIBRARIES

Array = Any

try:
    import ml_dtypes

    BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
except ImportError:  # bfloat16 cases then say that they need it
    BFLOAT16 = None


def numpy_dtype(name: str) -> Any:
    """The NumPy dtype of a name, bfloat16 included."""
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


class Target:
    """A library on a device: eager, with NumPy's memory where it can share it."""

    strided = True
    """Whether arrays may keep the strides that they come in with."""

    def __init__(self, library: str, module: str, device: str) -> None:
        self.library, self.module, self.device_name = library, module, device

    def __repr__(self) -> str:
        return f"{self.library}[{self.device_name}]"

    def missing(self) -> str | None:
        """Why this target cannot run here, or None."""
        if not all(part.isidentifier() for part in self.module.split(".")):
            return "not the name of a module"
        root = self.module.partition(".")[0]
        if importlib.util.find_spec(root) is None:
            return "not installed"
        try:
            with self.active():
                self.xp.zeros((1,), device=self.device)
        except (Exception, SystemExit) as error:  # of its import too
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return None

    @property
    def xp(self) -> Any:
        """The namespace as arrays of the library have it."""
        return compat.array_namespace(importlib.import_module(self.module).zeros((1,)))

    @property
    def device(self) -> Any:
        """The device to make arrays on; None for the library's default."""
        return None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Settings under which a case runs."""
        yield

    def asarray(self, a: Array) -> Array:
        """Bring a NumPy array into the library, sharing memory where the library can."""
        xp = self.xp
        if a.dtype.name == "bfloat16":
            return xp.astype(self.asarray(a.astype(np.float32)), xp.bfloat16)
        dtype = getattr(xp, a.dtype.name)
        try:
            return xp.asarray(a, dtype=dtype, device=self.device)
        except (TypeError, ValueError, NotImplementedError):
            return xp.asarray(a.tolist(), dtype=dtype, device=self.device)

    def to_numpy(self, a: Array) -> Array:
        """Bring an array of the library back."""
        if str(a.dtype).endswith("bfloat16") and BFLOAT16 is not None:
            return self.to_numpy(self.xp.astype(a, self.xp.float32)).astype(BFLOAT16)
        try:
            return np.from_dlpack(a)
        except (AttributeError, BufferError, TypeError, RuntimeError):
            return np.asarray(a)

    def call(self, f: Callable[..., Any], *args: Any) -> Any:
        """Run a function, and check what every call owes: its own kind of arrays, inputs unchanged."""
        given = tree_map(self.asarray, args, np.ndarray)
        result = f(*given)
        for before, after in zip(leaves(args), leaves(given), strict=True):
            if isinstance(before, np.ndarray) and not np.array_equal(
                after := self.to_numpy(after), before
            ):
                np.testing.assert_array_equal(  # NaN is equal to NaN here
                    after.astype(float), before.astype(float), "an input was changed"
                )
        return tree_map(self.returned, result)

    def returned(self, a: Array) -> Array:
        """Check the library and device of a result, and bring it back."""
        if not hasattr(a, "dtype"):
            return a
        assert compat.array_namespace(a) is self.xp, f"got an array of {type(a)}, not of {self}"
        expected = compat.device(self.xp.zeros((1,), device=self.device))
        assert compat.device(a) == expected, f"got an array on {compat.device(a)}, not on {expected}"
        return self.to_numpy(a)


@contextlib.contextmanager
def kernels(name: str | None) -> Iterator[None]:
    """Run on one backend: a case that it cannot run fails, instead of passing on another."""
    asked = bn.get_kernels()
    bn.set_kernels(name)
    try:
        yield
    finally:
        bn.set_kernels(asked)


class OnKernels(Target):
    """A device, perhaps with the backend that cases run on, as in "cpu-native"."""

    def __init__(self, library: str, module: str, device: str) -> None:
        super().__init__(library, module, device)
        self.kind, _, self.kernels = device.partition("-")

    def missing(self) -> str | None:
        if self.kernels == "native" and core.missing() is not None:
            return f"the compiled core is not there: {core.missing()}"
        why_not = super().missing()
        if self.kernels == "cupy" and why_not is None:
            from batchnorm.backends.cuda.devices import unusable

            return unusable()
        return why_not

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with kernels(self.kernels or None):
            yield


class NumPy(OnKernels):
    """NumPy's arrays; the mode is a backend."""

    def __init__(self, library: str, module: str, device: str) -> None:
        super().__init__(library, module, device)
        self.kernels = device

    def asarray(self, a: Array) -> Array:
        return a  # as it is, with its strides and flags

    def to_numpy(self, a: Array) -> Array:
        return a


class Strict(Target):
    @property
    def device(self) -> Any:
        return self.xp.Device(self.device_name)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with self.xp.ArrayAPIStrictFlags(boolean_indexing=False, data_dependent_shapes=False):
            yield

    def asarray(self, a: Array) -> Array:
        return self.xp.asarray(a, dtype=getattr(self.xp, a.dtype.name), device=self.device)

    def to_numpy(self, a: Array) -> Array:
        cpu = self.xp.Device("CPU_DEVICE")
        return np.asarray(compat.to_device(a, cpu))


class Torch(OnKernels):
    """PyTorch's tensors on a device, or on a backend for the CPU."""

    @property
    def device(self) -> Any:
        return importlib.import_module("torch").device(self.kind)

    def asarray(self, a: Array) -> Array:
        torch = importlib.import_module("torch")
        if a.dtype.name == "bfloat16":
            return self.asarray(a.astype(np.float32)).to(torch.bfloat16)
        if not a.flags.writeable or any(s < 0 for s in a.strides):
            a = a.copy(order="K")  # torch has neither read-only memory nor negative strides
        return torch.from_numpy(np.asarray(a)).to(self.kind)

    def to_numpy(self, a: Array) -> Array:
        torch = importlib.import_module("torch")
        if a.dtype == torch.bfloat16:
            return a.detach().cpu().float().numpy().astype(BFLOAT16)
        return a.detach().cpu().numpy()

    def returned(self, a: Array) -> Array:
        if not hasattr(a, "dtype"):
            return a
        assert compat.is_torch_array(a), f"got an array of {type(a)}, not of {self}"
        assert a.device.type == self.kind
        return self.to_numpy(a)


class Jax(Target):
    strided = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        jax = importlib.import_module("jax")
        asked = "jax" if self.device_name.endswith("-jax") else None
        with jax.enable_x64("x64" in self.device_name), kernels(asked or bn.get_kernels()):
            yield

    def asarray(self, a: Array) -> Array:
        return self.xp.asarray(a)

    def to_numpy(self, a: Array) -> Array:
        return np.asarray(a)

    def call(self, f: Callable[..., Any], *args: Any) -> Any:
        for a in leaves(args):  # JAX would make float32 of it without a word
            if getattr(a, "dtype", None) == np.float64 and "x64" not in self.device_name:
                raise TypeError("float64 needs jax_enable_x64")
        if not self.device_name.startswith("jit"):
            return super().call(f, *args)
        jax = importlib.import_module("jax")
        arrays = [a for a in leaves(args) if isinstance(a, np.ndarray)]
        shapes: list[Any] = []

        def traced(*traced_arrays: Any) -> Any:
            position = iter(traced_arrays)
            result = f(*tree_map(lambda _: next(position), args, np.ndarray))
            shapes.append(result)
            return [a for a in leaves(result) if hasattr(a, "dtype")]

        out = iter(jax.jit(traced)(*(self.asarray(a) for a in arrays)))
        return tree_map(lambda a: self.returned(next(out)) if hasattr(a, "dtype") else a, shapes[0])


class Dask(Target):
    def asarray(self, a: Array) -> Array:
        dask_array = importlib.import_module("dask.array")
        return dask_array.from_array(a, chunks=tuple(max(1, -(-n // 2)) for n in a.shape))

    def to_numpy(self, a: Array) -> Array:
        return a.compute(scheduler="synchronous")

    def call(self, f: Callable[..., Any], *args: Any) -> Any:
        import dask

        def refuse(*_: Any, **__: Any) -> Any:
            raise AssertionError("compute was called")

        given = tree_map(self.asarray, args, np.ndarray)
        with dask.config.set(scheduler=refuse):
            result = f(*given)
        return tree_map(self.returned, result)


class Ndonnx(Target):
    strided = False

    def asarray(self, a: Array) -> Array:
        return self.xp.asarray(a)

    def to_numpy(self, a: Array) -> Array:
        return a.unwrap_numpy()

    def call(self, f: Callable[..., Any], *args: Any) -> Any:
        import ndonnx
        import onnxruntime

        feeds: dict[str, Array] = {}
        inputs: dict[str, Any] = {}

        def argument(a: Array) -> Any:
            name = f"in{len(feeds)}"
            feeds[name] = np.ascontiguousarray(a) if a.ndim else a
            shape = a.shape
            if self.device_name == "dynamic" and a.ndim > 1:  # a batch of any size
                shape = (f"{name}_size", *a.shape[1:])
            inputs[name] = ndonnx.argument(shape=shape, dtype=getattr(ndonnx, a.dtype.name))
            return inputs[name]

        result = f(*tree_map(argument, args, np.ndarray))
        outputs = {f"out{i}": a for i, a in enumerate(leaves(result)) if hasattr(a, "dtype")}
        model = ndonnx.build(inputs, outputs)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        out = iter(session.run(list(outputs), feeds))
        return tree_map(lambda a: next(out) if hasattr(a, "dtype") else a, result)


class CuPy(NumPy):
    """CuPy's arrays; the mode is a backend."""

    def asarray(self, a: Array) -> Array:
        """Bring an array over with its strides: the memory between its values comes along."""
        cupy = importlib.import_module("cupy")
        if a.flags.c_contiguous or a.size == 0:
            return cupy.asarray(a)
        low, high = np.lib.array_utils.byte_bounds(a)
        memory = cupy.asarray(np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low)))
        start = memory.data + (a.ctypes.data - low)
        return cupy.ndarray(a.shape, a.dtype, start, strides=a.strides)

    def to_numpy(self, a: Array) -> Array:
        return a.get()


class Dpnp(Target):
    def to_numpy(self, a: Array) -> Array:
        return importlib.import_module("dpnp").asnumpy(a)


class Sparse(Target):
    strided = False

    def to_numpy(self, a: Array) -> Array:
        return a.todense() if hasattr(a, "todense") else np.asarray(a)


OWN_WAY = {
    "numpy": NumPy,
    "array_api_strict": Strict,
    "torch": Torch,
    "jax": Jax,
    "dask": Dask,
    "cupy": CuPy,
    "ndonnx": Ndonnx,
    "dpnp": Dpnp,
    "sparse": Sparse,
}


class Part(NamedTuple):
    """What of a library runs where nobody asks for it by name: the first case of each test."""

    devices: tuple[str, ...]
    why: str
    asked: tuple[str, ...] = ()
    """Devices that run only where the library is asked for by name, as others do what they do."""


# The only place that says what runs by default: every case of a library that is not named here. The rest
# of these is marked `slow`, unless ``--array-library`` asks for the library.
PARTS = {
    "jax": Part(
        ("jit-x64",),
        "what a case calls is compiled, operator by operator or whole",
        # Compiled or not, with float64 or not: the other two are enough; array code is for all.
        asked=("jit", "eager-x64", "jit-x64-jax"),
    ),
    "dask": Part(
        ("lazy",), "its graphs are built and run by an interpreter, and its chunks are NumPy's"
    ),
    "ndonnx": Part(("dynamic",), "each case is a graph that is built, optimized and loaded"),
    "sparse": Part((), "it compiles each of its operators for seconds"),
}


class Unknown(Target):
    """A library that this package has never seen, on one of the devices that it lists."""

    def missing(self) -> str | None:
        """Why this target cannot run here, or None: also where it would be another library that runs."""
        why = super().missing()
        if why is not None or dispatch._added:  # kernels of one's own, for arrays of a known library
            return why
        kind = type(self._module.asarray(np.zeros((1,))))
        for name, row in LIBRARIES.items():
            module = sys.modules.get(row.module)
            if module is not None and kind is type(module.asarray(np.zeros((1,)))):
                return (
                    f"its arrays are {name}'s, whose functions would be tested in the place of its own"
                )
        return None

    @property
    def _module(self) -> Any:
        return importlib.import_module(self.module)

    @property
    def device(self) -> Any:
        named = {str(d): d for d in devices_of(self.module)}
        return named.get(self.device_name)

    def asarray(self, a: Array) -> Array:
        """Bring an array in as the library's users do, by its own `asarray`."""
        if not hasattr(self._module, "asarray") or a.dtype.name == "bfloat16":
            return super().asarray(a)
        dtype = getattr(self._module, a.dtype.name, None)
        options = {"device": self.device} if self.device is not None else {}
        options |= {"dtype": dtype} if dtype is not None else {}
        try:
            return self._module.asarray(a, **options)
        except (TypeError, ValueError, NotImplementedError):
            return self._module.asarray(a.tolist(), **options)


def targets(name: str) -> list[Target]:
    """The targets of a library: of the table, by its name or module, or any importable one."""
    for library, row in LIBRARIES.items():
        if name in (library, row.module):
            return [OWN_WAY[library](library, row.module, device) for device in row.devices]
    devices = [str(d) for d in devices_of(name)] or ["default"]
    return [Unknown(name, name, device) for device in devices]


def tried(name: str) -> tuple[list[Target], dict[str, str]]:
    """The targets of a library that can run here, and why others cannot."""
    missing = {target: target.missing() for target in targets(name)}
    usable = [target for target, why in missing.items() if why is None]
    return usable, {repr(target): why for target, why in missing.items() if why is not None}


def devices_of(module: str) -> list[Any]:
    """The devices that an unknown library lists, if it does."""
    try:
        info = importlib.import_module(module).__array_namespace_info__()
        return [d for d in info.devices() if d is not None]
    except (Exception, SystemExit):  # `Target.missing` says why
        return []


def tree_map(f: Callable[[Any], Any], tree: Any, only: type = object) -> Any:
    """Apply a function to the leaves of nested tuples and dicts (those of one type, if given)."""
    if isinstance(tree, dict):
        return {key: tree_map(f, value, only) for key, value in tree.items()}
    if isinstance(tree, tuple):
        mapped = [tree_map(f, value, only) for value in tree]
        return type(tree)(*mapped) if hasattr(tree, "_fields") else tuple(mapped)
    return f(tree) if isinstance(tree, only) else tree


def leaves(tree: Any) -> list[Any]:
    """The leaves of nested tuples and dicts."""
    found: list[Any] = []
    tree_map(found.append, tree)
    return found
