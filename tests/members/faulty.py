"""One member of three, of which rank 1 goes wrong in the third step; what each of them then holds.

python -m members.faulty {mpi,gloo} {killed,hangs,channels,dtype,raises,backward} folder
"""

import os
import pickle
import signal
import sys
import time
from pathlib import Path

import numpy as np

import batchnorm as bn
from batchnorm.testing import data
from members.worker import group_of

TIMEOUT = 4


def go_wrong(fault, layer, x):
    """What the third step of rank 1 is; its input."""
    if fault == "hangs":
        time.sleep(2 * TIMEOUT)
    if fault == "channels":
        layer.__init__(6, group=layer.group)
        return data.batch((8, 6))
    if fault == "dtype":
        return x.astype(np.float64)
    if fault == "raises":
        return np.zeros((8, 4), int)
    return x


def steps(group, fault):
    """Train until something is wrong; then what a member reports."""
    layer = bn.BatchNorm(4, group=group)
    committed = []
    for step in range(4):
        x = data.batch((8, 4), mean=3.0, seed=[group.rank, step])
        start = time.monotonic()
        try:
            if step == 2 and group.rank == 1:
                x = go_wrong(fault, layer, x)
            y = layer(x)
            if step == 2 and group.rank == 1:
                if fault == "killed":  # between forward and backward
                    os.kill(os.getpid(), signal.SIGKILL)
                y = y[:5] if fault == "backward" else y
            layer.backward(y)
        except (bn.distributed.GroupError, TypeError, ValueError) as error:
            same = all(
                np.array_equal(a, b)
                for a, b in zip((layer.running_mean, layer.running_var), committed[-1], strict=True)
            )
            again = None
            if fault not in ("killed", "hangs"):
                y, stats = bn.batch_norm(data.batch((8, 4), seed=group.rank), group=group)
                again = float(stats.count[0])
            return {
                "step": step,
                "error": f"{type(error).__name__}: {error}",
                "seconds": time.monotonic() - start,
                "batches": layer.num_batches_tracked,
                "unchanged": same,
                "again": again,
            }
        committed.append((layer.running_mean.copy(), layer.running_var.copy()))
    return {"step": 4}


def main(engine, fault, folder):
    group = group_of(engine, folder, TIMEOUT)
    found = steps(group, fault)
    begun = Path(folder, f"{group.rank}.part")
    begun.write_bytes(pickle.dumps(found))
    begun.rename(begun.with_suffix(".pickle"))
    # An MPI launcher ends all members with the first; engines wait at the end for who is gone.
    others = (0, 2) if fault in ("killed", "hangs") else (0, 1, 2)
    end = time.monotonic() + 60
    while not all(Path(folder, f"{r}.pickle").exists() for r in others) and time.monotonic() < end:
        time.sleep(0.01)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
