"""PyTorch's own threads, on which the core works on its tensors."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data
from batchnorm.testing.libraries import kernels

torch = pytest.importorskip("torch")
pytest.importorskip("batchnorm._core")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux shows them")


@pytest.fixture(autouse=True)
def native():
    before = torch.get_num_threads()
    with kernels("native"):
        yield
    bn.set_num_threads(None)
    torch.set_num_threads(before)


def passes(x, dy):
    y, stats = bn.batch_norm(x)
    dx, *grads = bn.batch_norm_backward(dy, x, stats)
    return [np.asarray(v) for v in (y, dx, *stats, *grads, bn.normalize(x, stats.mean, stats.var))]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_the_bits_of_numpy_arrays(count, dtype):
    x, dy = (data.batch((16, 24, 2000), dtype, seed=seed) for seed in (1, 2))
    bn.set_num_threads(count)
    torch.set_num_threads(count)
    for a, b in zip(passes(torch.from_numpy(x), torch.from_numpy(dy)), passes(x, dy), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_thread_of_its_own():
    """In a process that only has tensors, the core starts no workers beside PyTorch's."""
    code = """
import os, torch, batchnorm as bn
torch.set_num_threads(2)
x = torch.randn(32, 64, 56, 56)
torch.nn.functional.batch_norm(x, None, None, training=True)  # starts PyTorch's
before = len(os.listdir("/proc/self/task"))
y, stats = bn.batch_norm(x)
bn.batch_norm_backward(y, x, stats)
bn.moments(x)
assert len(os.listdir("/proc/self/task")) == before
bn.batch_norm(x.numpy())
assert len(os.listdir("/proc/self/task")) == before + 1
"""
    import subprocess

    environment = {**os.environ, "BATCHNORM_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_callers_on_many_threads():
    bn.set_num_threads(2)
    arrays = [data.batch((16, 24, 500 + 700 * (i % 3)), mean=i, seed=i) for i in range(6)]
    wanted = [passes(x, x) for x in arrays]

    def work(i):
        for _ in range(5):
            x = torch.from_numpy(arrays[i])
            for a, b in zip(passes(x, x), wanted[i], strict=True):
                np.testing.assert_array_equal(a, b)
        return i

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6), timeout=300)) == list(range(6))


def test_inside_a_thread_of_pytorch():
    """The backward pass runs on a thread of PyTorch's engine, and inside of one task of another."""
    x = torch.randn(16, 24, 2000, requires_grad=True)
    y, _ = bn.batch_norm(x)
    y.square().mean().backward()
    seen = []
    thread = threading.Thread(target=lambda: seen.append(bn.batch_norm(x.detach())[0]))
    thread.start()
    thread.join(60)
    torch.testing.assert_close(seen[0], y.detach(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork.*:RuntimeWarning")
def test_a_forked_child_has_none_of_them():
    """PyTorch's runtime would wait for ever for threads that the child has not got."""
    x = torch.from_numpy(data.batch((16, 24, 2000)))
    bn.set_num_threads(2)
    wanted = passes(x, x)
    child = os.fork()
    if child == 0:
        import signal

        signal.alarm(30)
        same = all((a == b).all() for a, b in zip(passes(x, x), wanted, strict=True))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
