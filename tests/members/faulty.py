"""One member of some, of which rank 1 goes wrong in the third step; what each of them then holds.

python -m members.faulty {mpi,gloo} fault folder
"""

import contextlib
import copy
import os
import pickle
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np

import batchnorm as bn
from batchnorm.backends.dispatch import backend_for
from batchnorm.testing import data
from members.worker import group_of

# Seconds that a member waits for others: who is told what is wrong does not; who is not, waits less.
TIMEOUT, SHORT = 60, 4
LATE = ("killed", "hangs")
# Faults after which the member takes no part in anything.
GONE = (*LATE, "refuses and stays away")


def out_of_memory(which):
    """Have a kernel find no memory, in the middle of a call."""

    def failing(*arrays):
        def fail(*arguments, **options):
            raise MemoryError("no room for this")

        backend = copy.copy(backend_for(*arrays))
        setattr(backend, which, fail)
        return backend

    bn.passes.backend_for = failing


def wait_for(*files):
    """Wait until others have written files; whether they have, within a minute."""
    end = time.monotonic() + 60
    while not (found := all(map(os.path.exists, files))) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def reports(ranks):
    """What members write when they are done."""
    return [FOLDER / f"{rank}.pickle" for rank in ranks]


def hang(layer, x):
    if not wait_for(*reports((0, 2))):
        print("nobody gave up")
    sys.stdout.flush()
    os._exit(0)


def other_channels(layer, x):
    layer.__init__(6, group=layer.group)
    return data.batch((8, 6))


def no_kernels(layer, x):
    bn.set_kernels("cupy")
    return x


def no_memory(layer, x):
    out_of_memory("moments")
    return x


def no_memory_for_y(layer, x):
    out_of_memory("output")
    return x


def no_memory_backward(layer, x):
    out_of_memory("grad_sums")
    return x


def lazy(layer, x):
    import dask.array

    layer.__init__(4, group=layer.group)
    return dask.array.from_array(x)


def wrong_eps(layer, x):
    layer.eps = "a"
    return x


def interrupted(layer, x):
    def wake(*_):
        signal.set_wakeup_fd(-1)
        there.close()
        raise TimeoutError("waited for long enough")

    own, waits = layer.group._gather, []
    here, there = socket.socketpair()

    def tell():  # when the signal has come: an engine that waits outside of Python answers it later
        here.recv(1)
        (FOLDER / "interrupted").touch()

    def gather(row):
        wait = own(row)

        def waiting():
            if not waits:  # the first time, which no other member ends
                waits.append(row)
                signal.setitimer(signal.ITIMER_REAL, 0.1)
            return wait()

        return waiting

    there.setblocking(False)
    signal.set_wakeup_fd(there.fileno())
    threading.Thread(target=tell, daemon=True).start()
    signal.signal(signal.SIGALRM, wake)
    layer.group._gather = gather
    return x


def out_of_order(layer, x):
    return layer.backward(x)


# What the third step of rank 1 does to the layer, and its input.
FAULTS = {
    "hangs": hang,
    "channels": other_channels,
    "dtype": lambda layer, x: x.astype(np.float64),
    "raises": lambda layer, x: np.zeros((8, 4), int),
    "refuses and stays away": lambda layer, x: x[0],
    "no kernels": no_kernels,
    "no memory": no_memory,
    "no memory for y": no_memory_for_y,
    "no memory, backward": no_memory_backward,
    "lazy": lazy,
    "eps": wrong_eps,
    "interrupted": interrupted,
    "out of order": out_of_order,
}


def steps(group, fault):
    """Train until something is wrong; then what a member reports."""
    wide = 40_000 if fault.endswith("of many channels") else 4  # beyond one vector for all
    layer = bn.BatchNorm(wide, group=group)
    committed = []
    for step in range(4):
        x = data.batch((8, wide), mean=3.0, seed=[group.rank, step])
        wrong = step == 2 and group.rank == 1
        if fault == "interrupted" and step == 2 and not wrong:
            wait_for(FOLDER / "interrupted")
        start = time.monotonic()
        try:
            if wrong:
                x = FAULTS.get(fault.removesuffix(" of many channels"), lambda layer, x: x)(layer, x)
            y = layer(x)
            if wrong and fault == "killed":  # between forward and backward
                os.kill(os.getpid(), signal.SIGKILL)
            layer.backward(y[:5] if wrong and fault == "backward" else y)
        except (
            bn.distributed.GroupError,
            TypeError,
            ValueError,
            RuntimeError,
            MemoryError,
            TimeoutError,
        ) as error:
            seconds = time.monotonic() - start
            bn.passes.backend_for = backend_for
            bn.set_kernels(None)
            return {
                "step": step,
                "error": f"{type(error).__name__}: {error}",
                "seconds": seconds,
                "batches": layer.num_batches_tracked,
                "unchanged": all(
                    np.array_equal(a, b)
                    for a, b in zip((layer.running_mean, layer.running_var), committed[-1], strict=True)
                ),
                "again": again(group, wide, fault),
            }
        committed.append((layer.running_mean.copy(), layer.running_var.copy()))
    return {"step": 4}


def again(group, wide, fault):
    """Use the group once more, where all members are there; the values behind a mean, and its error."""
    if fault in GONE:
        return None
    if fault == "no memory for y" and group.rank == 1:  # the others are in backward
        with contextlib.suppress(bn.distributed.GroupError):
            group.all_reduce(np.zeros(3))
            raise AssertionError("no error")
    parts = [data.batch((8, wide), seed=rank) for rank in range(group.size)]
    _, stats = bn.batch_norm(parts[group.rank], group=group)
    right = np.concatenate(parts).astype(float).mean(0)
    return float(stats.count[0]), float(abs(stats.mean - right).max())


def main(engine, fault, folder):
    global FOLDER
    FOLDER = Path(folder)
    group = group_of(engine, folder, SHORT if fault in LATE else TIMEOUT)
    found = steps(group, fault)
    begun = Path(folder, f"{group.rank}.part")
    begun.write_bytes(pickle.dumps(found))
    begun.rename(begun.with_suffix(".pickle"))
    # An MPI launcher ends all members with the first; engines wait at the end for who is gone.
    others = [rank for rank in range(group.size) if not (fault in GONE and rank == 1)]
    wait_for(*reports(others))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
