"""Groups of processes or devices that normalize one batch together: adapters to existing engines.

What they give goes into ``group=`` of the functions and of the layer. Engines are imported when they
are asked for.
"""

from __future__ import annotations

from typing import Any

__all__ = ["GroupError", "jax", "mpi", "nccl", "torch"]


class GroupError(RuntimeError):
    """Members of a group did not come together: one is missing, late, or came with something else.

    Nothing was changed by the call that raises it.
    """


def mpi(comm: Any = None, *, timeout: float | None = 300.0) -> Any:
    """Make a group of the processes of an MPI communicator.

    All of them have to call this: the first time, it duplicates the communicator, so that messages do
    not meet others. The duplicate serves all groups of the communicator, and is freed with it.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, optional
        ``MPI.COMM_WORLD`` where it is left out.
    timeout : float or None, default 300
        Seconds after which a call that waits for others is a `GroupError`; None waits for ever.

    Returns
    -------
    group
        With ``rank``, ``size`` and ``all_reduce(array)``. Arrays of any eager library: what is not in
        the host's memory (CuPy's) takes its way over it, for the vectors are small.

    Raises
    ------
    TypeError
        `comm` is not a communicator.
    ModuleNotFoundError
        mpi4py is not installed.
    """
    from batchnorm.distributed.over_mpi import Mpi

    return Mpi(comm, timeout)


def nccl(comm: Any, *, timeout: float | None = 300.0) -> Any:
    """Make a group of the GPUs of an NCCL communicator, for CuPy's arrays.

    Parameters
    ----------
    comm : cupy.cuda.nccl.NcclCommunicator
        Each member's own.
    timeout : float or None, default 300
        Seconds after which a call that waits for others is a `GroupError`, and aborts the communicator.
        None neither waits nor compares what the members came with: calls then only enqueue work on the
        current stream, as NCCL does, and a member that is missing keeps the stream waiting.

    Returns
    -------
    group
        With ``rank``, ``size`` and ``all_reduce(array)``.

    Raises
    ------
    TypeError
        `comm` is not a communicator.
    """
    from batchnorm.distributed.over_nccl import Nccl

    return Nccl(comm, timeout)


def torch(process_group: Any = None, *, timeout: float | None = None, check: bool | None = None) -> Any:
    """Make a group of the processes of a ``torch.distributed`` process group: gloo, nccl or others.

    Parameters
    ----------
    process_group : torch.distributed.ProcessGroup, optional
        The default group where it is left out.
    timeout : float, optional
        Seconds after which a call that waits for others is a `GroupError`; the process group's own
        where it is left out.
    check : bool, optional
        Whether members compare what they came with before they add it up. Left out, they do unless the
        group's backend is nccl, where the host would have to wait for the device.

    Returns
    -------
    group
        With ``rank``, ``size`` and ``all_reduce(array)``. Arrays of PyTorch, NumPy, CuPy and others.

    Raises
    ------
    TypeError
        `process_group` is not one.
    RuntimeError
        ``torch.distributed.init_process_group`` was not called.
    """
    from batchnorm.distributed.over_torch import Torch

    return Torch(process_group, timeout, check)


def jax(axis_name: Any, axis_index_groups: Any = None) -> Any:
    """Make a group of the devices along a named axis of `jax.pmap` or `jax.shard_map`.

    Parameters
    ----------
    axis_name : hashable, or tuple of them
        The name (or names) of the axis over which batches are joined.
    axis_index_groups : list of lists of ints, optional
        Places along the axis that form groups of their own, as in `jax.lax.psum`.

    Returns
    -------
    group
        With ``rank``, ``size`` and ``all_reduce(array)``, which can be called where the axis is bound.
        Under ``jax.grad`` each device's gradient is that of the sum of all devices' losses.
    """
    from batchnorm.distributed.over_jax import Jax

    return Jax(axis_name, axis_index_groups)
