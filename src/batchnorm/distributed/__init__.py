"""Groups of processes or devices that normalize one batch together: adapters to existing engines.

Pass a group as ``group=`` to the functions or to the layer. An engine is imported when its adapter is
called for the first time.
"""

from __future__ import annotations

from typing import Any

from batchnorm.errors import GroupError

__all__ = ["GroupError", "jax", "mpi", "nccl", "torch"]


def mpi(comm: Any = None, *, timeout: float | None = 300.0) -> Any:
    """Make a group of the processes of an MPI communicator.

    All of the processes have to call this. The first call duplicates the communicator, so that messages
    of this package cannot be confused with others. All groups of the communicator share the duplicate,
    which is freed with it.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, optional
        ``MPI.COMM_WORLD`` by default.
    timeout : float or None, default 300
        Seconds after which a call that waits for other members raises `GroupError`; None for no limit.

    Returns
    -------
    group
        An object with ``rank``, ``size`` and ``all_reduce(array)``, for arrays of any eager library.
        Arrays on a device, such as CuPy's, are copied to the host and back; these vectors are small.

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
        The communicator of this member.
    timeout : float or None, default 300
        Seconds after which a call that waits for other members aborts the communicator and raises
        `GroupError`. With None, calls are neither waited for nor compared between the members: they only
        enqueue work on the current stream, as NCCL does, and if a member is missing, the stream waits.

    Returns
    -------
    group
        An object with ``rank``, ``size`` and ``all_reduce(array)``.

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
        The default process group if omitted.
    timeout : float, optional
        Seconds after which a call that waits for other members raises `GroupError`; by default, the
        timeout of the process group.
    check : bool, optional
        Whether the members compare their calls before they sum. The default is True, except with the
        backend nccl, where the host would have to wait for the device.

    Returns
    -------
    group
        An object with ``rank``, ``size`` and ``all_reduce(array)``, for arrays of PyTorch, NumPy, CuPy
        and others.

    Raises
    ------
    TypeError
        `process_group` is not a process group.
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
        The name (or names) of the axis along which the batch is split.
    axis_index_groups : list of lists of ints, optional
        Positions along the axis that form separate groups, as in `jax.lax.psum`.

    Returns
    -------
    group
        An object with ``rank``, ``size`` and ``all_reduce(array)``, usable in functions in which the
        axis is bound. Under ``jax.grad``, the gradient on each device is that of the sum of the losses
        of all devices.
    """
    from batchnorm.distributed.over_jax import Jax

    return Jax(axis_name, axis_index_groups)
