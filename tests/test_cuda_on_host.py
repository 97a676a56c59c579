"""The results of the CUDA kernels, run on the host: this needs a C++ compiler and no GPU."""

import contextlib
import ctypes
import os
import pathlib
import re
import subprocess
import sys
import types

import cuda_on_host
import numpy as np
import pytest
from test_suite import run_suite

import batchnorm as bn
from batchnorm.backends import dispatch
from batchnorm.backends.cuda import launches
from batchnorm.backends.cuda import running as cuda
from batchnorm.backends.cuda.arrangement import Arranged
from batchnorm.backends.cuda.launches import GIVEN, WRITE, MemoryLayout
from batchnorm.testing import data, verdict
from batchnorm.testing.oracle import Problem

pytestmark = pytest.mark.skipif(cuda_on_host.COMPILER is None, reason="no C++ compiler")
HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize("tiles", cuda_on_host.LIMITS)
def test_the_conformance_suite_passes(tiles, tmp_path):
    chosen = f"{tiles} and not large-first"  # to the kernels, that is large-second with one row
    arguments = ("-p", "cuda_on_host.plugin", "--array-library", "cuda_on_host", "-k", chosen)
    done = run_suite(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > 250


def check(shape, axis, dtype="float32", weighted=None, start=0, seed=0):
    """Compare both passes with the oracle, on arrays that begin at element `start` of their memory."""
    x, dy = (_displaced(data.batch(shape, dtype, mean=5.0, seed=s), start) for s in (seed, seed + 1))
    gamma, beta = data.parameters(data.channels(shape, axis), dtype)
    where = None if weighted is None else data.weights(shape, weighted)
    expected = Problem(x, gamma, beta, axis=axis, where=where)
    y, stats = bn.batch_norm(x, gamma, beta, axis=axis, where=where)
    grads = bn.batch_norm_backward(dy, x, stats, gamma, axis=axis, where=where)
    verdict.forward(y, expected, dtype)
    verdict.moments(stats, expected)
    verdict.backward(grads, expected.backward(dy), dtype, dtype)


def _displaced(a, start):
    memory = np.empty(a.size + start + 16, a.dtype)
    inside = memory[start : start + a.size].reshape(a.shape)
    inside[...] = a
    return inside


@pytest.mark.parametrize("tiles", cuda_on_host.LIMITS)
@pytest.mark.parametrize("dtype", launches.TYPES)
@pytest.mark.parametrize("start", [0, 1, 2, 4])
def test_any_alignment(tiles, dtype, start):
    with cuda_on_host.active(cuda_on_host.LIMITS[tiles]):
        check((4, 6, 16), 1, dtype, start=start)
        check((24, 12), 1, dtype, start=start)


SHAPES = [
    ((16, 300), 1),  # channels last, in several slices
    ((700, 3), 1),  # channels last, few of them
    ((2, 5, 777), 1),  # an odd number of contiguous elements
    ((150, 7, 3), 1),  # short rows
    ((2, 9, 31, 32), 1),
    ((41, 13, 24), -1),
    ((5000,), ()),  # one channel
]


@pytest.mark.parametrize("tiles", cuda_on_host.LIMITS)
@pytest.mark.parametrize("weighted", [None, "mask", "weights"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_shapes(tiles, shape, axis, weighted):
    with cuda_on_host.active(cuda_on_host.LIMITS[tiles]):
        check(shape, axis, weighted=weighted)


CONVERSIONS = """
extern "C" void widen(const unsigned short* from, float* half, float* bfloat16, int n) {
    for (int i = 0; i < n; ++i) {
        half[i] = half_to_float(from[i]);
        bfloat16[i] = bfloat16_to_float(from[i]);
    }
}
extern "C" void narrow(const float* from, unsigned short* half, unsigned short* bfloat16, int n) {
    for (int i = 0; i < n; ++i) {
        half[i] = float_to_half(from[i]);
        bfloat16[i] = float_to_bfloat16(from[i]);
    }
}
"""


def test_conversions_of_16_bit_numbers():
    """All numbers, the halves between neighbours, and what is next to these round as elsewhere."""
    import ml_dtypes

    built = cuda_on_host.library((), cuda.source() + CONVERSIONS)

    def converted(function, a, dtype):
        found = [np.empty(a.shape, dtype) for _ in range(2)]
        getattr(built, function)(*(ctypes.c_void_p(v.ctypes.data) for v in (a, *found)), a.size)
        return found

    every = np.arange(2**16, dtype=np.uint16)
    dtypes = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
    for found, dtype in zip(converted("widen", every, np.float32), dtypes, strict=True):
        values = every.view(dtype).astype(np.float32)
        np.testing.assert_array_equal(found, values)
        np.testing.assert_array_equal(np.signbit(found), np.signbit(values))
        bits = values.view(np.uint32)
        middle = bits + (np.uint32(1) << np.uint32(12 if dtype == np.float16 else 15))
        near = np.concatenate([bits, middle - 1, middle, middle + 1]).view(np.float32)
        subnormal = np.ldexp(np.arange(-4096, 4096, dtype=np.float32), -26)  # in float16
        near = np.concatenate([near, subnormal])
        rounded = converted("narrow", near, np.uint16)[dtypes.index(dtype)].view(dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = near.astype(dtype)
        np.testing.assert_array_equal(rounded.astype(np.float32), expected.astype(np.float32))


def test_results_do_not_depend_on_the_order_of_blocks():
    """Blocks run concurrently, in another order each time, and the results are bit-identical."""
    x, dy = data.batch((16, 9, 120)), data.batch((16, 9, 120), seed=1)
    found = set()
    with cuda_on_host.active():
        for _ in range(12):
            y, stats = bn.batch_norm(x)
            grads = bn.batch_norm_backward(dy, x, stats)
            found.add(b"".join(a.tobytes() for a in (y, *stats, *grads)))
    assert len(found) == 1


def test_an_outlier_at_a_thread_s_first_value():
    """The pivot is an outlier, and the variance is still accurate."""
    for dtype in ("float32", "float64"):
        x = data.batch((4000, 3), dtype)
        x[0], x[256], x[-1] = 1e6, -1e7, 1e5
        with cuda_on_host.active(cuda_on_host.LIMITS["large-tiles"]):
            y, stats = bn.batch_norm(x)
        verdict.forward(y, Problem(x), dtype)
        verdict.moments(stats, Problem(x))


# Faults by name: the right text, and a wrong one in its place.
FAULTS = {
    "no barrier before sums are read": ("    __syncthreads();\n    if (active) {", "    if (active) {"),
    "no barrier after sums are written": (
        "    __syncthreads();\n    if (tile.lane < reducers) {",
        "    if (tile.lane < reducers) {",
    ),
    "no barrier before factors are read": (
        "        __syncthreads();\n        P::write(params, tile, shared);",
        "        P::write(params, tile, shared);",
    ),
    "outputs do not wait for sums": ("while (atomicAdd(done, 0u) == 0) __nanosleep(64);", ";"),
    "the wrong part's sums": ("parent * FAN;", "parent * FAN + 1;"),
    "a row's end missed": ("if (in_row >= row ||", "if (in_row > row ||"),
    "one position too many": (
        "last < params.positions ? last :",
        "last < params.positions ? last + 1 :",
    ),
    "the neighbour's mean": (
        "int local = tile.bundle * CH + ch;\n            double sum_dy =",
        "int local = tile.bundle * CH;\n            double sum_dy =",
    ),
    "a tree's node done too early": ("== siblings;", "+ 1 == siblings;"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    right, wrong = FAULTS[fault]
    assert cuda.source().count(right) == 1, "the text to break is there once"
    source = cuda.source().replace(right, wrong)
    with pytest.raises(AssertionError):
        check_often(source)


def check_often(source):
    for seed in range(20):
        for limits in cuda_on_host.LIMITS.values():
            with cuda_on_host.active(limits, source=source):
                check((40, 6, 12), 1, seed=seed)
                check((40, 12), 1, seed=seed)
                check((40, 3, 100), 1, seed=seed)


def test_strides_of_more_than_32_bits():
    """Rows are 9 GB apart, and only their first elements are touched."""
    far = 2**31 + 64
    memory = np.empty(far + 4096, np.float32)  # untouched pages take no memory
    memory_layout = MemoryLayout(2, 4, 8, far, 8, 1)
    rows = [slice(0, 32), slice(far, far + 32)]
    for row in rows:
        memory[row] = data.batch((32,), seed=row.start % 7)
    before = [memory[row].copy() for row in rows]
    device = cuda_on_host.device(cuda_on_host.LIMITS["small-tiles"])
    layout = bn.validation.validate_input(np.empty((2, 4, 8), np.float32), 1)
    factors = tuple(np.full(4, v, np.float32) for v in (0.5, 2.0, 1.0))
    arranged = Arranged((memory,), None, memory_layout, None, (0, 1, 2))
    cuda.run(device, layout, "normalize", WRITE | GIVEN, arranged, out=memory, factors=factors)
    for row, was in zip(rows, before, strict=True):
        np.testing.assert_array_equal(memory[row], 2 * (was - np.float32(0.5)) + 1)


BOUNDS = """
import sys
import cuda_on_host
import test_cuda_on_host as t
from test_cuda_epilogues import Case
options = ("-fsanitize=address", "--param=asan-stack=0")
source = t.cuda.source()
if len(sys.argv) > 1:
    source = source.replace("in_range ? cursor.offset : 0", "cursor.offset")
with cuda_on_host.active(source=source, options=options):
    for shape, axis in (((5, 6, 9), 1), ((33, 12), 1), ((7, 4, 20), 1), ((3, 5, 7), -1)):
        for weighted in (None, "mask"):
            t.check(shape, axis, weighted=weighted)
for seed in range(6):
    Case("float32", "relu", seed).check(True, seed % 2 == 1, source=source, options=options)
print("within bounds")
"""


def test_no_access_outside_of_arrays():
    """AddressSanitizer checks every load and store, and detects one that is out of bounds."""
    find = [cuda_on_host.COMPILER, "-print-file-name=libasan.so"]
    runtime = subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("the C++ compiler has no AddressSanitizer")
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
    }

    def run(*arguments):
        command = [sys.executable, "-c", BOUNDS, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    right = run()
    assert right.returncode == 0, right.stderr[-3000:]
    assert "within bounds" in right.stdout
    wrong = run("broken")
    assert wrong.returncode != 0
    assert "ERROR: AddressSanitizer" in wrong.stderr


# CuPy arrays and PyTorch CUDA tensors, with a substitute for the GPU.


class OnFakeGPU(np.ndarray):
    """A NumPy array with the attributes of CuPy arrays that `backends/cuda/devices.py` uses."""

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.ctypes.data)


class NullContext:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def fake_cupy(monkeypatch):
    """Install a substitute for CuPy that runs kernels on the host, and yield the list of its calls."""
    calls = []
    host = cuda_on_host.device(cuda_on_host.LIMITS["small-tiles"])

    class RawModule:
        def __init__(self, code, options, name_expressions):
            assert code == cuda.source()
            assert options == ("-std=c++17",)
            (self.name,) = name_expressions

        def get_function(self, name):
            assert name == self.name

            def launch(grid, block, arguments, stream):
                assert block == (launches.THREADS,)
                (params,) = arguments
                assert params.size == 1, "CuPy passes an array of one element by value"
                calls.append(f"{name} on stream {stream.ptr}")
                host.launch(name, params.tobytes(), grid[0], 0, 0)

            return launch

    def memset(address, value, size, stream):
        assert value == 0
        ctypes.memset(address, 0, size)
        calls.append(f"memset on stream {stream}")

    def get_device():
        return 0

    class Device(NullContext):
        def __init__(self, index):
            self.attributes = {"MultiProcessorCount": 2, "L2CacheSize": 6 * 2**10}
            calls.append(f"device {index}")

    runtime = types.SimpleNamespace(memsetAsync=memset, getDevice=get_device, is_hip=False)
    runtime.getDeviceCount = lambda: 1
    cupy = types.ModuleType("cupy")
    cupy.RawModule, cupy.ascontiguousarray, cupy.ndarray = RawModule, np.ascontiguousarray, OnFakeGPU
    cupy.cuda = types.SimpleNamespace(
        runtime=runtime,
        Device=Device,
        get_current_stream=lambda: types.SimpleNamespace(ptr=7, is_capturing=lambda: False),
    )
    from batchnorm.backends.cuda import devices as module

    monkeypatch.setitem(sys.modules, "cupy", cupy)
    caches = (module.unusable, module._on_arrays, module._on_tensors, module._kernel)
    caches += (dispatch._candidates,)
    for cache in caches:
        cache.cache_clear()
    yield calls
    for cache in caches:
        cache.cache_clear()


class OnFakeGPUOnly:
    """NumPy, with new arrays that look like CuPy's."""

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, *args, **kwargs):
        return np.empty(*args, **{**kwargs, "device": None}).view(OnFakeGPU)


def test_cupy_launches_the_kernels(fake_cupy):
    from batchnorm.backends.cuda import devices as module

    x = data.batch((40, 6, 1200))
    gamma, beta = data.parameters((6,))
    layout = bn.validation.validate_input(x, 1)._replace(xp=OnFakeGPUOnly(), device=None)
    found = module._on_arrays(0)
    assert found.name == "cupy"
    y, stats = found.forward(
        *(a.view(OnFakeGPU) if a is not None else a for a in (x, None, gamma, beta)), 1e-5, layout
    )
    expected = Problem(x, gamma, beta)
    verdict.forward(np.asarray(y), expected, "float32")
    verdict.moments(stats, expected)
    assert fake_cupy == [
        "device 0",
        "memset on stream 7",
        "forward<float, 4, false, None, false> on stream 7",
    ]


def test_pytorch_s_stream_is_used(fake_cupy, monkeypatch):
    import torch

    current = types.SimpleNamespace(cuda_stream=99)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: current)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    from batchnorm.backends.cuda import devices as module

    x = torch.from_numpy(data.batch((40, 6, 12)))
    layout = bn.validation.validate_input(x, 1)
    y, stats = module._on_tensors(0).forward(x, None, None, None, 1e-5, layout)
    verdict.forward(y.numpy(), Problem(x.numpy()), "float32")
    assert fake_cupy == ["device 0", "forward<float, 4, false, None, false> on stream 99"]
    found = module._on_tensors(0).backward(y, x, None, stats, None, 1e-5, layout)
    verdict.backward(
        tuple(v.numpy() for v in found), Problem(x.numpy()).backward(y.numpy()), "float32", "float32"
    )


@pytest.fixture
def cuda_tensor(monkeypatch):
    """Yield a tensor that is dispatched as one on a GPU."""
    import torch

    from batchnorm.backends import tensors

    monkeypatch.setattr(tensors, "refuses", lambda arrays, device: None if device == "cuda" else "")
    dispatch._candidates.cache_clear()
    yield torch.zeros((4, 3))
    dispatch._candidates.cache_clear()


def test_cuda_tensors_run_on_them_where_cupy_is_there(fake_cupy, cuda_tensor):
    found = bn.kernels_for(cuda_tensor)
    assert found.name == "cupy"
    assert "PyTorch's stream" in found.why


def test_cuda_tensors_without_cupy_say_so(monkeypatch, cuda_tensor):
    from batchnorm.backends.cuda import devices as module

    monkeypatch.setattr(module, "unusable", lambda: "CuPy is not installed: pip install it")
    found = bn.kernels_for(cuda_tensor)
    assert found.name == "generic"
    assert "CuPy is not installed" in found.why
    with asked("cupy"), pytest.raises(TypeError, match="'cupy' asked for, but CuPy is not installed"):
        bn.kernels_for(cuda_tensor)
    with (
        asked("native"),
        pytest.raises(TypeError, match="'native' asked for, but x is an array of torch on"),
    ):
        bn.kernels_for(cuda_tensor)


@contextlib.contextmanager
def asked(name):
    bn.set_kernels(name)
    try:
        yield
    finally:
        bn.set_kernels(None)


def test_numpy_arrays_are_not_on_a_gpu():
    with asked("cupy"), pytest.raises(TypeError, match="'cupy' asked for, but"):
        bn.batch_norm(np.zeros((4, 3), np.float32))
