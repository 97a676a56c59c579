"""One member of a group: solves its part of every case, and writes what it found to a file.

python -m members.worker {mpi,gloo} {numpy,torch} folder
"""

import os
import pickle
import sys
from pathlib import Path

import numpy as np

import batchnorm as bn
from members.problems import CHANNELS, STEPS, cases


def group_of(engine, folder, timeout=60):
    """The group of this process's fellow members."""
    if engine == "mpi":
        return bn.distributed.mpi(timeout=timeout)
    from datetime import timedelta

    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=timeout),
    )
    return bn.distributed.torch()


def leave():
    """End a process of gloo when all are done; its threads now and then abort an orderly end."""
    import torch.distributed as dist

    dist.barrier()
    os._exit(0)


def counting(group):
    """The same group, and how often it adds up."""
    calls = []
    inner = group.all_reduce

    def all_reduce(array):
        calls.append(tuple(array.shape))
        return inner(array)

    group.all_reduce = all_reduce
    return calls


def arrays_of(kind):
    """From NumPy and back."""
    if kind == "numpy":
        return lambda a: a, lambda a: np.asarray(a)
    import torch

    return (lambda a: a if a is None else torch.tensor(a)), lambda a: a.numpy()


def solve(case, group, calls, into, out_of):
    gamma, beta = map(into, case.parameters())
    found = []
    layer = bn.BatchNorm(CHANNELS, group=group)
    for step in range(STEPS):
        x, dy, where = map(into, case.part(step, group.rank))
        del calls[:]
        y, stats = bn.batch_norm(x, gamma, beta, where=where, group=group)
        forward = len(calls)
        grads = bn.batch_norm_backward(dy, x, stats, gamma, where=where, group=group)
        found.append([*map(out_of, (y, *stats, *grads)), forward, len(calls) - forward])
        layer(x, where=where)
        layer.backward(dy)
    return found, [out_of(layer.running_mean), out_of(layer.running_var)]


def main(engine, kind, folder):
    group = group_of(engine, folder)
    calls = counting(group)
    into, out_of = arrays_of(kind)
    found = {case.name: solve(case, group, calls, into, out_of) for case in cases(group.size)}
    Path(folder, f"{group.rank}.pickle").write_bytes(pickle.dumps(found))
    if engine == "gloo":
        leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
