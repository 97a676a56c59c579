"""An array library that batchnorm has never seen: NumPy in a box, behind the standard alone.

Arrays have no NumPy methods and no `__array__`; every function comes from the module. UNSEEN_BREAKS in
the environment names one of FAULTS, what an author might get wrong.
"""

import operator
import os

import numpy as np

__array_api_version__ = "2024.12"


class Array:
    def __init__(self, boxed):
        self._boxed = boxed

    dtype = property(lambda self: self._boxed.dtype)
    shape = property(lambda self: self._boxed.shape)
    ndim = property(lambda self: self._boxed.ndim)
    device = property(lambda self: "box")

    def __array_namespace__(self, api_version=None):
        import unseen

        return unseen

    def to_device(self, device, stream=None):
        return self

    def __getitem__(self, key):
        return Array(np.asarray(self._boxed[key]))

    def __setitem__(self, key, value):
        self._boxed[key] = _unbox(value)

    def __bool__(self):
        return bool(self._boxed)

    def __dlpack__(self, **options):
        return self._boxed.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._boxed.__dlpack_device__()


def _unbox(value):
    if isinstance(value, Array):
        return value._boxed
    return type(value)(_unbox(v) for v in value) if isinstance(value, (tuple, list)) else value


def _box(value):
    if isinstance(value, (np.ndarray, np.generic)):
        return Array(np.asarray(value))
    return type(value)(_box(v) for v in value) if isinstance(value, (tuple, list)) else value


FAULTS = {
    "sum": "a sum loses its last term",
    "broadcast": "what is broadcast begins again after 64 places",
    "reshape": "values are reshaped in the order of memory",
    "integers": "integers are 1 as floating numbers",
    "astype": "astype(copy=True) returns its input where the dtype is the same",
    "comparisons": "comparisons with NaN are true",
    "maximum": "the maximum of NaN and a number is the number",
}


def _breaks(fault):
    assert fault in FAULTS
    return os.environ.get("UNSEEN_BREAKS") == fault


def _operator(name, reflected=False):
    function = getattr(operator, name)

    def method(self, other):
        pair = (_unbox(other), self._boxed) if reflected else (self._boxed, _unbox(other))
        if _breaks("broadcast"):
            pair = _begun_again(*pair)
        result = function(*pair)
        if _breaks("comparisons") and name in ("lt", "le", "gt", "ge"):
            result = result | np.isnan(pair[0]) | np.isnan(pair[1])
        return _box(result)

    return method


def _begun_again(*pair):
    """Arrays of which the one that is broadcast has its first 64 places again and again."""
    shape = np.broadcast_shapes(*map(np.shape, pair))
    for i, a in enumerate(pair):
        if np.shape(a) != shape and np.size(a) > 64:
            long = int(np.argmax(np.shape(a)))
            taken = np.take(a, np.arange(np.shape(a)[long]) % 64, axis=long)
            pair = (*pair[:i], taken, *pair[i + 1 :])
    return pair


for _name in ("add", "sub", "mul", "truediv"):
    setattr(Array, f"__{_name}__", _operator(_name))
    setattr(Array, f"__r{_name}__", _operator(_name, reflected=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "and_", "or_"):
    setattr(Array, f"__{_name.rstrip('_')}__", _operator(_name))
Array.__neg__ = lambda self: _box(-self._boxed)
Array.__invert__ = lambda self: _box(~self._boxed)
Array.__hash__ = None


class _Info:
    def devices(self):
        return ["box"]

    def dtypes(self, *, device=None, kind=None):
        return {"float32": np.dtype("float32"), "float64": np.dtype("float64")}


def __array_namespace_info__():
    return _Info()


def sum(x, /, **options):
    if _breaks("sum") and x.shape[options["axis"]] > 2:
        x = x[(slice(None),) * options["axis"] + (slice(0, -1),)]
    return _box(np.sum(_unbox(x), **options))


def reshape(x, shape, /):
    a = x._boxed
    return _box(np.reshape(a.ravel(order="K") if _breaks("reshape") else a, shape))


def astype(x, dtype, /, *, copy=True, device=None):
    a = x._boxed
    if _breaks("integers") and a.dtype.kind in "iu":
        return _box(np.sign(a).astype(dtype))
    if a.dtype == dtype and (_breaks("astype") or not copy):
        return x
    return _box(a.astype(dtype))


def maximum(x, y, /):
    return _box((np.fmax if _breaks("maximum") else np.maximum)(_unbox(x), _unbox(y)))


def __getattr__(name):
    found = getattr(np, name)  # AttributeError where NumPy has no such name
    if name.startswith("__") or isinstance(found, type) or not callable(found):
        return np.dtype(found) if isinstance(found, type) and issubclass(found, np.generic) else found

    def function(*arguments, device=None, **options):
        return _box(found(*(_unbox(a) for a in arguments), **{k: _unbox(v) for k, v in options.items()}))

    return function
