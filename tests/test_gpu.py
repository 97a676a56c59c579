"""Tests that need a GPU: graphs, streams, large arrays, and the choice of the CUDA kernels."""

import math

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.backends.cuda import devices as kernels
from batchnorm.bench import gpu
from batchnorm.testing import data, verdict
from batchnorm.testing.oracle import Problem

pytestmark = pytest.mark.skipif(kernels.unusable() is not None, reason=str(kernels.unusable()))

LARGE = (3, 64, 12_000_000)  # 9.2 GB of float32


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


@pytest.fixture
def torch():
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")
    return module


def test_which_kernels_run(cupy):
    assert bn.kernels_for(cupy.zeros((4, 3), np.float32)).name == "cupy"


def test_which_kernels_run_for_tensors(torch):
    x = torch.zeros((4, 3), device="cuda")
    assert bn.kernels_for(x).name == "cupy"
    assert bn.kernels_for(x.requires_grad_()).name == "operators"


def check(given, results):
    x, dy, gamma, beta = given
    y, stats, (dx, dgamma, dbeta) = results
    expected = Problem(x, gamma, beta)
    verdict.forward(y, expected, "float32")
    verdict.moments(bn.Moments(*stats), expected)
    verdict.backward((dx, dgamma, dbeta), expected.backward(dy), "float32", "float32")


def problem(shape, seed):
    return (
        data.batch(shape, mean=1e3, seed=seed),
        data.batch(shape, seed=seed + 1),
        *data.parameters((shape[1],), seed=seed),
    )


def passes(x, dy, gamma, beta):
    y, stats = bn.batch_norm(x, gamma, beta)
    return y, stats, bn.batch_norm_backward(dy, x, stats, gamma)


@pytest.mark.parametrize("shape", [(64, 100), (16, 6, 30_000)], ids=["one launch", "ordered"])
def test_a_captured_graph_of_cupy(cupy, shape):
    """A graph is captured once and replayed on new data. Memory allocated in between is not written."""
    given = problem(shape, 0)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        arrays = [cupy.asarray(a) for a in given]
        passes(*arrays)  # compiles and loads the kernels, fills the pool
        stream.begin_capture()
        results = passes(*arrays)
        graph = stream.end_capture()
        others = [cupy.full((n,), 7.0) for n in (10, 1000, 100_000)]
        for seed in (3, 4):
            given = problem(shape, seed)
            for array, a in zip(arrays, given, strict=True):
                array.set(a)
            graph.launch(stream)
            stream.synchronize()
            y, stats, grads = results
            check(given, (y.get(), [v.get() for v in stats], [v.get() for v in grads]))
        assert all(bool((a == 7).all()) for a in others)


def test_a_captured_graph_of_pytorch(torch):
    given = problem((16, 6, 30_000), 0)
    tensors = [torch.from_numpy(a).cuda() for a in given]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        passes(*tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, stats, grads = passes(*tensors)
    given = problem((16, 6, 30_000), 5)
    for tensor, a in zip(tensors, given, strict=True):
        tensor.copy_(torch.from_numpy(a))
    graph.replay()
    torch.cuda.synchronize()
    check(given, (y.cpu().numpy(), [v.cpu().numpy() for v in stats], [v.cpu().numpy() for v in grads]))


def test_a_mask_is_not_checked_during_a_capture(cupy):
    stream = cupy.cuda.Stream(non_blocking=True)
    x, mask = data.batch((40, 6)), data.weights((40, 6), "mask")
    with stream:
        on_device, where = cupy.asarray(x), cupy.asarray(mask)
        bn.batch_norm(on_device, where=where)
        stream.begin_capture()
        y, _ = bn.batch_norm(on_device, where=where)
        graph = stream.end_capture()
        graph.launch(stream)
        stream.synchronize()
    verdict.forward(y.get(), Problem(x, where=mask), "float32")


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_the_current_stream_is_used(library, cupy, torch):
    """The kernels run after earlier work on the stream: a long computation of x."""
    given = problem((64, 32, 4096), 1)
    if library == "cupy":
        with cupy.cuda.Stream(non_blocking=True) as stream:
            source, *arrays = (cupy.asarray(a) for a in given)
            ones = cupy.ones((8192, 8192), np.float32)
            x = cupy.zeros_like(source)
            for _ in range(4):
                ones = ones @ ones * np.float32(1 / 8192)
            x += source * ones[0, 0]
            results = passes(x, *arrays)
            stream.synchronize()
            y, stats, grads = results
            check(given, (y.get(), [v.get() for v in stats], [v.get() for v in grads]))
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        source, *tensors = (torch.from_numpy(a).cuda() for a in given)
        ones = torch.ones((8192, 8192), device="cuda")
        x = torch.zeros_like(source)
        for _ in range(4):
            ones = ones @ ones / 8192
        x += source * ones[0, 0]
        y, stats, grads = passes(x, *tensors)
        torch.cuda.current_stream().synchronize()
    check(given, (y.cpu().numpy(), [v.cpu().numpy() for v in stats], [v.cpu().numpy() for v in grads]))


def test_results_are_bit_identical_each_time(torch):
    x, dy = (torch.randn((32, 64, 56, 56), device="cuda") for _ in range(2))
    found = []
    for _ in range(20):
        y, stats = bn.batch_norm(x)
        found.append((y, *stats, *bn.batch_norm_backward(dy, x, stats)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_nine_gigabytes(torch, which):
    if torch.cuda.mem_get_info()[0] < 12 * math.prod(LARGE) * 4:
        pytest.skip("needs 110 GB of free device memory")
    (case,) = gpu.cases(LARGE, "second", "float32", "cuda", 1)
    result = gpu.package(lambda a: a)(case, which)()
    for first in range(0, LARGE[1], 16):  # in parts: the oracle needs much more memory
        channels = slice(first, first + 16)
        part = gpu.Case(*(a[:, channels] if a.ndim > 1 else a[channels] for a in case))
        largest = gpu.error(result[:, channels], part, which)
        assert largest <= (verdict.FORWARD if which == "forward" else verdict.BACKWARD)


@pytest.mark.parametrize("mean", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("layout", ["second", "last"])
def test_errors_with_large_means(torch, mean, layout):
    (case,) = gpu.cases((32, 64, 112, 112), layout, "float32", "cuda", 1)
    case.x.add_(mean)
    for which, bound in (("forward", verdict.FORWARD), ("backward", verdict.BACKWARD)):
        assert gpu.error(gpu.package(lambda a: a)(case, which)(), case, which) <= bound


def test_subnormals_are_flushed(cupy):
    """CuPy compiles with -ftz=true, so subnormal float32 inputs and results count as 0."""
    x = np.float32([[1e-39], [-1e-39], [1.0], [-1.0]])
    y = bn.normalize(cupy.asarray(x), cupy.zeros(1), cupy.ones(1), eps=0.0).get()
    np.testing.assert_array_equal(y, np.float32([[0], [0], [1], [-1]]))
    halves = np.float16([[6e-8], [-6e-8], [1.0]])  # float32 holds these as normal numbers
    y = bn.normalize(cupy.asarray(halves), cupy.zeros(1), cupy.ones(1), eps=0.0).get()
    np.testing.assert_array_equal(y, halves)
