"""Peaks of memory of passes over a Dask array, beside what was there before, in MB.

python tests/bounded.py folder {forward,backward,jvp,double backward} workers source ...

A source that ends in "+where" has weights of its own shape.

Prints one line for each source: its name and the peak.
"""

import pathlib
import sys
import threading
import time

import dask
import dask.array as da
import numpy as np
import zarr

import batchnorm as bn

ROWS, CHANNELS, PLACES, CHUNK = 2400, 64, 500, 32  # 307 MB in chunks of 4


def chunk(i):
    return np.random.default_rng(i).standard_normal((CHUNK, CHANNELS, PLACES), dtype=np.float32)


def stored(folder):
    """The path of a Zarr array, which is written once."""
    path = pathlib.Path(folder, "x.zarr")
    if not path.exists():
        shape, chunks = (ROWS, CHANNELS, PLACES), (CHUNK, CHANNELS, PLACES)
        x = zarr.create_array(path, shape=shape, chunks=chunks, dtype="float32", compressors=None)
        for i in range(ROWS // CHUNK):
            x[i * CHUNK : (i + 1) * CHUNK] = chunk(i)
    return str(path)


def delayed(folder):
    shape = (CHUNK, CHANNELS, PLACES)
    parts = [dask.delayed(chunk)(i) for i in range(ROWS // CHUNK)]
    return da.concatenate([da.from_delayed(part, shape, np.float32) for part in parts])


SOURCES = {
    "from_zarr": lambda folder: da.from_zarr(stored(folder)),
    "slice": lambda folder: da.from_zarr(stored(folder))[5:],
    "rechunk": lambda folder: da.from_zarr(stored(folder)).rechunk((24, CHANNELS, PLACES)),
    "reshape": lambda folder: da.from_zarr(stored(folder)).reshape(ROWS, CHANNELS, 100, PLACES // 100),
    "from_delayed": delayed,
}


def passes(which, x, where):
    """The output of a pass over x, whose statistics are still to come."""
    y, stats = bn.batch_norm(x, where=where)
    if which == "forward":
        return y
    if which == "backward":
        return bn.batch_norm_backward(y, x, stats, where=where)[0]
    if which == "jvp":
        return bn.batch_norm_jvp(x * x, None, None, x, stats, where=where)[0]
    return bn.batch_norm_double_backward(x * x, None, None, y, x, stats, where=where)[1]


def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


class Sink:
    """Where chunks go and are forgotten."""

    def __setitem__(self, place, values):
        pass


def peak(result, workers):
    """The most memory while a result goes by."""
    before, found, done = resident(), [0.0], threading.Event()

    def watch():
        while not done.is_set():
            found[0] = max(found[0], resident() - before)
            time.sleep(0.005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with dask.config.set(scheduler="threads", num_workers=workers):
        result.store(Sink(), lock=False)
    done.set()
    watcher.join()
    return found[0]


def main(folder, which, workers, *sources):
    bn.set_kernels("numpy")
    for source in sources:
        x = SOURCES[source.removesuffix("+where")](folder)
        where = abs(x) if source.endswith("+where") else None
        print(source, f"{peak(passes(which, x, where), int(workers)):.0f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
