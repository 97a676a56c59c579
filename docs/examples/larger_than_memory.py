"""Normalize a Zarr array that is larger than the memory that this process may use.

Writes an array of random numbers in chunks, bounds the memory of this process (or of a cluster of two),
normalizes the array into another, and copies it with Dask alone, as the limit of what can be reached.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import zarr

import batchnorm as bn

MB = 2**20


def create(path: str, shape: tuple[int, ...], rows: int) -> None:
    """Values with a mean of 1e4 in every channel, in chunks of some rows."""
    target = zarr.create_array(
        path, shape=shape, chunks=(rows, *shape[1:]), dtype="f4", compressors=None
    )
    rng = np.random.default_rng(0)
    for start in range(0, shape[0], rows):
        size = (min(rows, shape[0] - start), *shape[1:])
        target[start : start + rows] = rng.standard_normal(size, np.float32) + np.float32(1e4)


def bound(megabytes: int) -> None:
    """Refuse this process more private memory than that; 0 for what it had at first."""
    threading.stack_size(MB)  # what stacks might grow to counts, and there are dozens of threads
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (megabytes * MB or most, most))


def peak() -> float:
    """The most memory that this process had in use so far, in MB."""
    # Not `ru_maxrss`, which begins with what the parent had.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def copy(source: str, target: str) -> float:
    """Seconds to copy an array with Dask."""
    start = time.perf_counter()
    da.from_zarr(source).to_zarr(target, overwrite=True)
    return time.perf_counter() - start


def normalize(source: str, target: str) -> float:
    """Seconds to normalize an array from one file into another."""
    start = time.perf_counter()
    y, _ = bn.batch_norm(da.from_zarr(source))
    y.to_zarr(target, overwrite=True)
    return time.perf_counter() - start


def check(source: str, target: str) -> float:
    """How far the output is from float64 arithmetic on some channels, in units of its std."""
    x, y = zarr.open_array(source, mode="r"), zarr.open_array(target, mode="r")
    rows, channels = range(0, x.shape[0], x.chunks[0]), [0, x.shape[1] - 1]
    wide = np.concatenate([x[i : i + x.chunks[0]][:, channels].astype(float) for i in rows])
    mean, std = wide.mean((0, 2), keepdims=True), np.sqrt(wide.var((0, 2), keepdims=True) + 1e-5)
    worst = 0.0
    for i in rows:
        expected = (wide[i : i + x.chunks[0]] - mean) / std
        worst = max(worst, float(abs(y[i : i + x.chunks[0]][:, channels] - expected).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=512, help="MB of memory that a process may use")
    parser.add_argument("--size", type=int, default=2048, help="MB of the array")
    parser.add_argument("--workers", type=int, default=0, help="processes of a cluster; 0: threads here")
    parser.add_argument("--copy", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", action="store_true", help="print numbers for programs")
    chosen = parser.parse_args()
    channels, length, rows = 32, 1024, 32  # chunks of 4 MB
    shape = (chosen.size * MB // (4 * channels * length), channels, length)
    found: dict[str, Any] = {"size": chosen.size, "limit": chosen.limit}
    with tempfile.TemporaryDirectory() as folder:
        source, target, copied = (str(Path(folder, name)) for name in ("x", "y", "copy"))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as another:
            another.submit(create, source, shape, rows).result()
        if chosen.workers:
            from distributed import Client, LocalCluster

            with (
                LocalCluster(chosen.workers, threads_per_worker=1, dashboard_address=None) as cluster,
                Client(cluster) as client,
            ):
                client.run(bound, chosen.limit)
                found["copy"] = copy(source, copied) if chosen.copy else 0
                found["normalize"] = normalize(source, target)
                found["peak"] = max(client.run(peak).values())
        else:
            bound(chosen.limit)
            with dask.config.set(scheduler="threads", num_workers=2):
                found["copy"] = copy(source, copied) if chosen.copy else 0
                found["normalize"] = normalize(source, target)
            found["peak"] = peak()
            bound(0)
        found["error"] = check(source, target)
    if chosen.json:
        print(json.dumps(found))
        return
    print(
        "{size} MB in processes that may use {limit} MB, and used {peak:.0f} MB at most".format(**found)
    )
    for name in ("copy", "normalize")[not chosen.copy :]:
        print(f"{name}: {found[name]:.2f} s, {chosen.size / found[name]:.0f} MB/s")
    if chosen.copy:
        print(f"normalize takes {found['normalize'] / found['copy']:.2f} times the copy's time")
    print(f"off by {found['error']:.1e} at most, in units of the output's std")


if __name__ == "__main__":
    main()
