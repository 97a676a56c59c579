"""Dask arrays: chunks of any shape, streamed, on threads and on a cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data, verdict
from batchnorm.testing.oracle import Problem

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
CHUNKS = [
    ((40,), (6,), (5,)),
    ((7, 0, 20, 13), (6,), (5,)),
    ((11, 29), (1, 4, 1), (2, 3)),
    ((40,), (2, 0, 4), (5, 0)),
    ((0, 40), (0, 6, 0), (1, 0, 4)),
]


def judge(x, dy, where, dtype, chunks, scheduler, **settings):
    gamma, beta = data.parameters((6,), dtype)
    given = [da.from_array(a, chunks=chunks) for a in (x, dy)]
    vectors = [da.from_array(v, chunks=4) for v in (gamma, beta)]
    w = None if where is None else da.from_array(where, chunks=(9, 6, 5))
    y, stats = bn.batch_norm(given[0], *vectors, where=w)
    grads = bn.batch_norm_backward(given[1], given[0], stats, vectors[0], where=w)
    frozen = bn.normalize(given[0], stats.mean, stats.var, *vectors)
    assert y.chunks == given[0].chunks == grads[0].chunks
    y, stats, grads, frozen = dask.compute(y, stats, grads, frozen, scheduler=scheduler, **settings)
    expected = Problem(x, gamma, beta, where=where)
    verdict.forward(y, expected, dtype)
    verdict.moments(bn.Moments(*stats), expected)
    verdict.backward(grads, expected.backward(dy), dtype, dtype)
    if dtype == "float32":  # a float64 mean of 1e8 lacks the digits that `mean_lo` has
        verdict.forward(frozen, expected, dtype)


@pytest.mark.parametrize("kind", ["plain", "mask"])
@pytest.mark.parametrize(("dtype", "mean"), [("float32", 1e4), ("float64", 1e8)])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_chunks_along_any_axis(chunks, dtype, mean, kind):
    x, dy = (data.batch((40, 6, 5), dtype, mean=m, seed=s) for m, s in ((mean, 1), (0.5, 2)))
    where = None if kind == "plain" else data.weights((40, 6, 5), kind)
    judge(x, dy, where, dtype, chunks, "threads")


def test_a_cluster_of_two_processes():
    distributed = pytest.importorskip("distributed")
    x, dy = data.batch((40, 6, 5), mean=1e4), data.batch((40, 6, 5), seed=2)
    cluster = distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client:
        judge(x, dy, None, "float32", CHUNKS[2], client)


def test_recalibration_on_a_cluster_raises_what_a_chunk_raises():
    """A client does not wait for what it persists."""
    distributed = pytest.importorskip("distributed")

    def unreadable(chunk):
        raise OSError("a disk that is gone")

    a = data.batch((40, 6), mean=2.0)
    x, layer = da.from_array(a, chunks=(8, 6)), bn.BatchNorm(6)
    broken = x.map_blocks(unreadable, meta=a[:0])
    with distributed.Client(processes=False, dashboard_address=None):
        with pytest.raises(OSError, match="a disk that is gone"):
            bn.recalibrate(layer, layer, [x, broken], progress=False)
        assert layer.num_batches_tracked == 0
        bn.recalibrate(layer, layer, [x], progress=False)
        np.testing.assert_allclose(np.asarray(layer.running_mean), a.mean(0), rtol=1e-5)


@pytest.mark.parametrize("function", [bn.batch_norm, bn.moments, bn.BatchNorm(6)])
def test_unknown_chunk_sizes(function):
    x = da.from_array(data.batch((40, 6)), chunks=(7, 6))
    with pytest.raises(ValueError, match=r"x: got chunks of unknown size .*compute_chunk_sizes\(\)"):
        function(x[x[:, 0] > 0])


def reading(x, rows, read):
    """An array whose chunks tell when they are read."""

    def chunk(block_info=None):
        start = block_info[None]["array-location"][0][0]
        read.append(start)
        return x[start : start + rows]

    return da.map_blocks(
        chunk, chunks=((rows,) * (len(x) // rows), *x.shape[1:]), dtype=x.dtype, meta=x[:0]
    )


def test_each_chunk_is_read_for_the_statistics_and_again_for_the_output():
    """So none has to be kept from one pass to the other."""
    x, read = data.batch((40, 6)), []
    y, stats = bn.batch_norm(reading(x, 8, read))
    y.compute(scheduler="synchronous")
    once = [0, 8, 16, 24, 32]
    assert sorted(read[:5]) == sorted(read[5:]) == once
    stats = bn.Moments(*map(da.asarray, dask.compute(*stats)))
    del read[:]
    dx, *_ = bn.batch_norm_backward(da.from_array(x, chunks=8), reading(x, 8, read), stats)
    dx.compute(scheduler="synchronous")
    assert sorted(read[:5]) == sorted(read[5:]) == once


def test_equal_calls_have_equal_names():
    x = da.from_array(data.batch((40, 6)), chunks=(7, 6))
    assert bn.batch_norm(x)[0].name == bn.batch_norm(x)[0].name


def test_chunks_run_on_their_own_kernels(monkeypatch):
    from batchnorm.backends import dispatch

    own = dispatch.backend_for
    seen = set()

    def spy(*arrays):
        found = own(*arrays)
        seen.add((type(arrays[0]), found.name))
        return found

    monkeypatch.setattr(dispatch, "backend_for", spy)
    dispatch._candidates.cache_clear()
    x = da.from_array(data.batch((40, 6)), chunks=(7, 6))
    assert bn.kernels_for(x).name == "dask"
    y, stats = bn.batch_norm(x)
    dask.compute(y, bn.batch_norm_backward(y, x, stats), scheduler="synchronous")
    assert seen == {(np.ndarray, bn.kernels_for(np.zeros((4, 6))).name)}


def test_a_chain_of_layers_has_a_graph_that_grows_with_its_length():
    """Each layer's second reading goes through those before it, but computes no statistics anew."""
    y, x = None, data.batch((80, 6))
    lengths = []
    for _ in range(10):
        y = bn.batch_norm(da.from_array(x, chunks=(40, 6)) if y is None else y)[0]
        lengths.append(len(dict(y.__dask_graph__())))
    assert lengths[9] < 20 * lengths[0]
    wide = x.astype(float)
    for _ in range(10):
        wide = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    np.testing.assert_allclose(y.compute(scheduler="synchronous"), wide, atol=1e-5)


def test_gradients_through_a_lazy_result():
    """Everything from x, nothing computed in between; second order too."""
    a, u = data.batch((40, 6), mean=3.0), data.batch((40, 6), seed=1)
    x, v = da.from_array(a, chunks=(7, 4))[2:], da.from_array(u, chunks=(9, 6))[2:]
    y, stats = bn.batch_norm(x)
    found = dask.compute(
        bn.batch_norm_backward(y, x, stats),
        bn.batch_norm_jvp(v, None, None, x, stats),
        bn.batch_norm_double_backward(v, None, None, y, x, stats),
        scheduler="synchronous",
    )
    y, stats = bn.batch_norm(a[2:])
    right = (
        bn.batch_norm_backward(y, a[2:], stats),
        bn.batch_norm_jvp(u[2:], None, None, a[2:], stats),
        bn.batch_norm_double_backward(u[2:], None, None, y, a[2:], stats),
    )
    for mine, other in zip(found, right, strict=True):
        for p, q in zip(mine, other, strict=True):
            np.testing.assert_allclose(p, q, rtol=1e-4, atol=1e-4)


MASKED = "got an array of MaskedArray chunks, expected a plain array, and its mask inverted as `where`"


def test_a_masked_array_is_refused():
    a = data.batch((40, 6))
    x, masked = da.from_array(a), da.ma.masked_array(da.from_array(a), mask=a > 1)
    with pytest.raises(TypeError, match=f"x: {MASKED}"):
        bn.batch_norm(masked)
    with pytest.raises(TypeError, match=f"where: {MASKED}"):
        bn.moments(x, where=abs(masked))
    # One that does not say so before it is computed.
    hidden = x.map_blocks(lambda block: np.ma.masked_array(block, block > 1), meta=a[:0])
    with pytest.raises(TypeError, match="x: got a MaskedArray, expected a plain array"):
        bn.batch_norm(hidden)[0].compute(scheduler="synchronous")


ALL = "from_zarr+where from_zarr slice rechunk reshape from_delayed"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux tells it")
@pytest.mark.parametrize(
    ("which", "workers", "sources"),
    [
        pytest.param("forward", 1, ALL, marks=pytest.mark.slow),
        ("forward", 2, "slice from_zarr+where"),
        pytest.param("backward", 1, "slice from_zarr+where", marks=pytest.mark.slow),
        pytest.param("backward", 2, ALL, marks=pytest.mark.slow),
        pytest.param("jvp", 1, "slice slice+where", marks=pytest.mark.slow),
        pytest.param("double backward", 2, "slice slice+where", marks=pytest.mark.slow),
    ],
)
def test_memory_is_bounded_whatever_the_array_comes_from(which, workers, sources, tmp_path):
    """Of an array of 307 MB, all and more was kept where it was not purely blockwise."""
    pytest.importorskip("zarr")
    program = Path(__file__).parent / "bounded.py"
    command = [sys.executable, program, tmp_path, which, str(workers), *sources.split()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    peaks = dict(line.split() for line in run.stdout.splitlines())
    assert list(peaks) == sources.split()
    assert max(map(float, peaks.values())) < 180, run.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded as Linux does it")
@pytest.mark.slow
@pytest.mark.parametrize(("workers", "size"), [(0, 1600), (2, 800)])
def test_a_zarr_array_of_more_than_the_memory(workers, size):
    """Of four times the memory, and on a cluster of twice what each worker may use."""
    pytest.importorskip("zarr")
    command = [sys.executable, EXAMPLES / "larger_than_memory.py", "--json"]
    command += ["--limit", "400", "--size", str(size), "--workers", str(workers), "--no-copy"]
    environment = {**os.environ, "BATCHNORM_KERNELS": "numpy"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["peak"] < found["limit"]
    assert found["error"] < 1e-6
