"""Threads and the output pool: many callers, forks, the interpreter's end, memory that comes back."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import batchnorm as bn
from batchnorm import outputs, threads
from batchnorm.testing import data
from batchnorm.testing.libraries import kernels

pytest.importorskip("batchnorm._core")


@pytest.fixture(autouse=True)
def default_settings():
    yield
    bn.set_num_threads(None)
    bn.set_output_pool(None)


@pytest.fixture(params=["native", "numpy"])
def chosen(request):
    with kernels(request.param):
        yield request.param


def expected_of(x):
    wide = x.astype(np.float64)
    mean, var = wide.mean((0, 2), keepdims=True), wide.var((0, 2), keepdims=True)
    return (wide - mean) / np.sqrt(var + 1e-5)


def test_eight_callers_at_once(chosen):
    """On one layer's functions, each with its own data; several sizes, so that helpers are shared."""
    bn.set_num_threads(3)
    batches = [data.batch((16, 24, 40 + 900 * (i % 3)), mean=i, seed=i) for i in range(8)]
    wanted = [expected_of(x) for x in batches]
    layer = bn.BatchNorm(24).eval()
    frozen = layer(batches[0])

    def work(i):
        for _ in range(12):
            y, stats = bn.batch_norm(batches[i], layer.gamma, layer.beta)
            np.testing.assert_allclose(y, wanted[i], rtol=0, atol=3e-6)
            dx, *_ = bn.batch_norm_backward(y, batches[i], stats, layer.gamma)
            assert abs(dx).max() < 1e-3  # y is what normalizing cannot change
            np.testing.assert_array_equal(layer(batches[0]), frozen)
        return i

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8), timeout=300)) == list(range(8))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("name", ["native", pytest.param("numpy", marks=pytest.mark.slow)])
def test_two_hundred_forks(name):
    """Children of a process whose threads run, and hold its locks: right results, no hang."""
    if name == "native":
        pytest.importorskip("batchnorm._core")
    command = [sys.executable, "-m", "forks", name]
    here = Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=here)
    assert done.returncode == 0, done.stderr


def test_calls_while_the_interpreter_ends(tmp_path):
    code = f"""
import atexit, threading
import numpy as np
import batchnorm as bn
bn.set_kernels({"native"!r})
bn.set_num_threads(2)
x = np.random.default_rng(0).normal(size=(16, 24, 2000)).astype(np.float32)
class Late:
    def __del__(self):
        print("late", bn.batch_norm(x)[0].shape)
calls = threading.Semaphore(0)
def forever():
    while True:
        bn.batch_norm(x)
        calls.release()
atexit.register(lambda: print("at exit", bn.batch_norm(x)[0].shape))
bn.batch_norm(x)
late = Late()
threading.Thread(target=forever, daemon=True).start()
for _ in range(20):
    calls.acquire()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "at exit (16, 24, 2000)" in done.stdout


def test_an_error_in_a_helper_reaches_the_caller():
    bn.set_num_threads(2)
    caller = threading.current_thread()
    met = threading.Barrier(2)

    def task(number):
        met.wait(30)
        if threading.current_thread() is not caller:
            raise ArithmeticError(f"in share {number}")

    with pytest.raises(ArithmeticError, match="share 1"):
        threads.run(task, 2)
    done = []
    threads.run(lambda number: done.append(number), 2)  # and the helpers still work
    assert 0 in done


def test_number_of_threads(monkeypatch):
    bn.set_num_threads(3)
    assert bn.get_num_threads() == 3
    for wrong, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="n: got .*, expected a whole number >= 1"):
            bn.set_num_threads(wrong)
    assert bn.get_num_threads() == 3
    bn.set_num_threads(None)
    monkeypatch.setenv("BATCHNORM_NUM_THREADS", "5")
    assert bn.get_num_threads() == 5
    bn.set_num_threads(None)
    monkeypatch.setenv("BATCHNORM_NUM_THREADS", "many")
    with pytest.raises(ValueError, match="BATCHNORM_NUM_THREADS: got 'many'"):
        bn.get_num_threads()
    monkeypatch.delenv("BATCHNORM_NUM_THREADS")
    if hasattr(os, "sched_getaffinity"):
        assert 1 <= bn.get_num_threads() <= len(os.sched_getaffinity(0))


def test_threadpoolctl_limits_the_core():
    code = """
import threadpoolctl
import numpy as np
import batchnorm as bn

bn.set_num_threads(3)
x = np.ones((8, 4, 9), np.float32)
bn.batch_norm(x)  # loads the core
(found,) = [lib for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "batchnorm"]
assert found["num_threads"] == 3, found
with threadpoolctl.threadpool_limits(1):
    assert bn.get_num_threads() == 1
assert bn.get_num_threads() == 3
with threadpoolctl.threadpool_limits({"batchnorm": 2}):
    assert bn.get_num_threads() == 2
"""
    pytest.importorskip("threadpoolctl")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# The output pool.

BIG = (8, 32, 64, 64)


def address(a):
    return a.__array_interface__["data"][0]


def test_memory_comes_back_when_nothing_refers_to_it(chosen):
    x = data.batch(BIG)
    bn.set_output_pool(None)
    y, _ = bn.batch_norm(x)
    first = address(y)
    part = y[1:, ::2].T
    del y
    gc.collect()
    other, _ = bn.batch_norm(x)
    assert address(other) != first  # a view is still there
    kept = part.copy()
    again, _ = bn.batch_norm(x + 1)
    np.testing.assert_array_equal(part, kept)
    del part, again, other
    reused, _ = bn.batch_norm(x)
    assert reused.flags.writeable
    del reused
    assert len(outputs._free) >= 1


def test_the_pool_is_bounded_and_can_be_switched_off(monkeypatch):
    x = data.batch(BIG)
    bn.set_output_pool(x.nbytes * 2 + 1000)
    ys = [bn.normalize(x, np.zeros(32), np.ones(32)) for _ in range(5)]
    del ys
    assert sum(raw.size for raw, _ in outputs._free) <= x.nbytes * 2 + 1000
    assert outputs._free
    bn.set_output_pool(0)
    assert not outputs._free
    y = bn.normalize(x, np.zeros(32), np.ones(32))
    del y
    assert not outputs._free
    for wrong, error in ((-1, ValueError), (1.5, TypeError), ("1 GB", TypeError)):
        with pytest.raises(error, match="max_bytes: got .*, expected a whole number >= 0"):
            bn.set_output_pool(wrong)
    monkeypatch.setenv("BATCHNORM_OUTPUT_POOL", "1 GB")
    with pytest.raises(ValueError, match="BATCHNORM_OUTPUT_POOL: got '1 GB'"):
        bn.set_output_pool(None)
    with pytest.raises(ValueError, match="BATCHNORM_OUTPUT_POOL: got '1 GB'"):
        bn.normalize(x, np.zeros(32), np.ones(32))


def test_a_tensor_keeps_its_memory():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(data.batch(BIG))
    y, _ = bn.batch_norm(x)
    first, kept = y.data_ptr(), y.clone()
    views = [y[0], torch.utils.dlpack.to_dlpack(y)]
    del y
    for _ in range(4):
        bn.batch_norm(x + 2)
    np.testing.assert_array_equal(views[0], kept[0])
    taken = torch.utils.dlpack.from_dlpack(views[1])
    assert taken.data_ptr() == first
    torch.testing.assert_close(taken, kept, rtol=0, atol=0)


def test_outputs_are_ordinary_arrays():
    x = data.batch(BIG)
    y, _ = bn.batch_norm(x)
    assert type(y) is np.ndarray
    assert y.flags.c_contiguous
    assert y.flags.writeable
    assert address(y) % 64 == 0
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    z, _ = bn.batch_norm(last)
    assert z.strides == last.strides
    gone = weakref.ref(z)
    del z
    assert gone() is None


def test_give_back_never_waits():
    """A finalizer may run while its own thread holds the lock."""
    x = data.batch(BIG)
    y, _ = bn.batch_norm(x)
    with outputs._lock:
        del y  # would hang if it waited


def test_a_huge_number_of_threads_is_as_many_as_there_can_be():
    x = np.random.default_rng(0).standard_normal((8, 16, 64, 64), dtype=np.float32)
    expected, _ = bn.batch_norm(x)
    bn.set_num_threads(10**30)
    try:
        np.testing.assert_array_equal(bn.batch_norm(x)[0], expected)
    finally:
        bn.set_num_threads(None)
