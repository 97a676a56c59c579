"""Groups of the processes of an MPI communicator, with mpi4py."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from batchnorm.distributed.members import Members, Rows, from_host, to_host, validate_timeout
from batchnorm.errors import describe_type, fail

Array = Any

# MPI may write to the buffers of a request until it is complete, even after the interpreter has ended.
# The buffers of a request that never completes (after an error, for example) must not be freed.
_incref = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", ctypes.pythonapi))
_decref = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_DecRef", ctypes.pythonapi))


class _Duplicate:
    """The duplicate of a communicator, in which only messages of this package are sent."""

    def __init__(self, comm: Any, request: Any) -> None:
        self.comm, self.request, self.broken = comm, request, False


@functools.cache
def _keyval(mpi: Any) -> Any:
    """Return the key of the attribute of a communicator that is its duplicate."""

    def free(comm: Any, key: int, found: _Duplicate) -> None:
        if not found.broken:
            found.comm.Free()

    return mpi.Comm.Create_keyval(delete_fn=free)


class Mpi(Members):
    """A group of `batchnorm.distributed.mpi`. No call blocks, because MPI itself has no timeout."""

    def __init__(self, comm: Any, timeout: float | None) -> None:
        super().__init__()
        try:
            from mpi4py import MPI
        except ModuleNotFoundError as error:
            hint = "pip install 'batchnorm[mpi]'"
            raise ModuleNotFoundError(f"mpi4py is not installed: {hint}", name="mpi4py") from error
        comm = MPI.COMM_WORLD if comm is None else comm
        if not isinstance(comm, MPI.Intracomm):
            fail(TypeError, "comm", describe_type(comm), "an mpi4py.MPI.Intracomm")
        self.timeout = validate_timeout(timeout)
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._error = MPI.Exception
        # MPI has about 2,000 communicators: all groups of a communicator share one duplicate, which is
        # freed with it. After an error, messages may be on their way in it, and another one is made.
        found: Any = comm.Get_attr(_keyval(MPI))
        if found is None or found.broken:
            found = _Duplicate(*comm.Idup())
            self._duplicate = found
            self._finish(found.request)
            found.comm.Set_errhandler(MPI.ERRORS_RETURN)
            comm.Set_attr(_keyval(MPI), found)
        self._duplicate = found
        self._comm = found.comm

    def _break(self, why: object) -> NoReturn:
        self._duplicate.broken = True
        super()._break(why)

    def _gather(self, row: Rows) -> Callable[[], Rows]:
        rows = np.empty((self.size, len(row)), np.uint8)
        request = self._begin("Iallgather", row, rows)

        def wait() -> Rows:
            self._finish(request, row, rows)
            return rows

        return wait

    def _to_vector(self, array: Array) -> Array:
        return np.ravel(to_host(array))

    def _zeros(self, size: int, dtype: str) -> Array:
        return np.zeros(size, dtype)

    def _sum(self, vector: Array) -> Array:
        total = np.empty_like(vector)
        self._finish(self._begin("Iallreduce", vector, total), vector, total)
        return total

    def _from_vector(self, vector: Array, like: Array) -> Array:
        return from_host(vector.reshape(like.shape), like)

    def _begin(self, collective: str, *buffers: Array) -> Any:
        for buffer in buffers:
            _incref(buffer)
        try:
            return getattr(self._comm, collective)(*buffers)
        except self._error as error:
            self._break(error)

    def _finish(self, request: Any, *buffers: Array) -> None:
        try:
            self._poll(request.Test)
        except self._error as error:
            self._break(error)
        for buffer in buffers:
            _decref(buffer)
